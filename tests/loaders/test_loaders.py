"""Every way to name an SAE, and every way in which one can be refused."""

import json
import pickle
import warnings

import pytest
import torch
from conftest import SITE, random_sae
from safetensors.torch import save_file

from diffusers_sae import InputError, LatentStatistics, MatryoshkaSAE, Site, load_sae


@pytest.fixture
def folder(tmp_path):
    random_sae(base_model="some/model").save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def steered(harness, **strength):
    harness.pipe.steer({3: 8.0})
    return harness.run()


def test_every_kind_of_source_gives_the_same_sae(sd, tmp_path):
    sae = random_sae()
    sae.save_pretrained(tmp_path / "repo" / "up1")
    state = dict(sae.state_dict())
    torch.save(state, tmp_path / "weights.pt")
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    config = {"k": sae.k}
    sources = [
        ((sae,), {}),
        ((tmp_path / "repo" / "up1",), {}),
        ((str(tmp_path / "repo"),), {"subfolder": "up1"}),
        ((tmp_path / "repo" / "up1" / "diffusion_pytorch_model.safetensors",), {}),
        ((state,), {"config": config, "site": SITE}),
        ((tmp_path / "weights.pt",), {"config": config, "site": SITE}),
        ((tmp_path / "nested.pt",), {"config": config, "site": SITE}),
    ]
    images = []
    for args, kwargs in sources:
        sd.pipe.load_sae(*args, **kwargs)
        images.append(steered(sd))
        sd.pipe.unload_sae()
    for image in images[1:]:
        assert torch.equal(images[0], image)


def test_a_state_dict_stays_the_callers(sd, sae):
    state = {key: tensor.detach().clone() for key, tensor in sae.state_dict().items()}
    sd.pipe.load_sae(state, config={"k": sae.k}, site=SITE)
    before = steered(sd)
    for tensor in state.values():
        tensor.zero_()
    assert torch.equal(sd.run(), before)


def test_names(sd, sae):
    sd.pipe.load_sae(sae)
    sd.pipe.load_sae(random_sae())
    sd.pipe.load_sae(random_sae(), adapter_name="mine")
    assert list(sd.pipe.get_list_saes()) == ["default_0", "default_1", "mine"]
    with pytest.raises(InputError, match="An SAE named 'mine' is loaded already"):
        sd.pipe.load_sae(random_sae(), adapter_name="mine")
    with pytest.raises(InputError, match="adapter_name is missing; loaded are 'default_0', 'default_1', 'mine'"):
        sd.pipe.steer({1: 1.0})
    with pytest.raises(InputError, match="No SAE is named 'yours'"):
        sd.pipe.steer({1: 1.0}, adapter_name="yours")
    sd.pipe.unload_sae()
    with pytest.raises(InputError, match="No SAE is loaded; call load_sae first"):
        sd.pipe.steer({1: 1.0})


def test_statistics_beside_the_weights_are_found(sd, folder):
    t = torch.tensor([900.0, 100.0])
    LatentStatistics(t, *(torch.full((2, 32), v) for v in (2.0, 9.0, 0.5))).save(folder)
    sd.pipe.load_sae(folder)
    sd.pipe.steer({3: 1.0}, unit="mean")
    by_mean = sd.run()
    sd.pipe.reset_steering()
    sd.pipe.steer({3: 4.0})
    torch.testing.assert_close(by_mean, sd.run())


def refuse(sd, sentence, *args, **kwargs):
    """The call is refused with `sentence`, and the pipeline is as it was."""
    before = sd.run()
    with pytest.raises(InputError) as error:
        sd.pipe.load_sae(*args, **kwargs)
    text = str(error.value)
    assert sentence in text and text.endswith(".")
    assert sd.pipe.get_list_saes() == {} and not sd.pipe.unet._forward_pre_hooks
    assert torch.equal(before, sd.run())


def test_an_altered_file_is_refused(sd, folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    refuse(sd, "does not have the checksum", folder)


def test_a_truncated_file_is_refused(sd, folder):
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse(sd, "does not have the checksum", folder)
    (folder / "checksums.json").unlink()
    refuse(sd, "is truncated or no weights file", folder)


def test_a_missing_file_is_refused(sd, folder):
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    refuse(sd, "is missing although", folder)


def test_altered_statistics_are_refused(sd, folder):
    (folder / "statistics.safetensors").write_bytes(b"nonsense")
    refuse(sd, "statistics.safetensors cannot be read", folder)


class Malicious:
    def __reduce__(self):
        return (print, ("code from a weights file was run",))


def test_a_pickle_is_refused_and_not_run(sd, tmp_path, capsys):
    file = tmp_path / "sae.pt"
    file.write_bytes(pickle.dumps(Malicious()))
    refuse(sd, "is a pickle that could run code", file, site=SITE)
    torch.save({"W_enc": Malicious()}, file)
    refuse(sd, "is a pickle that could run code", file, site=SITE)
    assert "was run" not in capsys.readouterr().out


def test_no_weights(sd, tmp_path):
    (tmp_path / "up1").mkdir()
    refuse(sd, "holds no SAE; pass subfolder, one of: up1", tmp_path)
    refuse(sd, "does not exist; its parent holds up1", tmp_path, subfolder="up2")
    refuse(sd, "does not exist; pass weight_name", tmp_path, weight_name="x.safetensors")
    for name in "ab":
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    refuse(sd, "holds several weights files (a.safetensors, b.safetensors); pass weight_name", tmp_path)
    refuse(sd, "has no matrix W_dec", tmp_path, weight_name="a.safetensors")


def test_a_repository_that_is_not_there(sd):
    refuse(
        sd, "is no folder or file here and could not be fetched from the hub", "nobody/nothing", local_files_only=True
    )
    refuse(sd, "could not be fetched from the hub", "not a name / at all")


def test_tensors_that_do_not_agree(sd, sae):
    state = dict(sae.state_dict())
    refuse(sd, "is of no known layout", {**state, "W_enc": state["W_enc"].T}, site=SITE, config={"k": 4})
    refuse(sd, "weights that are not finite", {**state, "b_enc": state["b_enc"] / 0}, site=SITE, config={"k": 4})
    refuse(sd, "has no b_dec", {k: v for k, v in state.items() if k != "b_dec"}, site=SITE, config={"k": 4})
    refuse(sd, "cannot be made a TopKSAE", state, site=SITE)
    refuse(sd, "k is 99, which must lie between 1 and n_latents (32)", state, site=SITE, config={"k": 99})
    refuse(sd, "is a MysterySAE, which is not known", state, site=SITE, config={"_class_name": "MysterySAE"})
    refuse(sd, "does not say which site it is for", state, config={"k": 4})


def test_an_unreadable_config_is_refused(sd, folder):
    (folder / "config.json").write_text("{")
    refuse(sd, "does not have the checksum", folder)
    (folder / "checksums.json").unlink()
    refuse(sd, "config.json cannot be read", folder)


def test_another_base_model_or_site_is_warned_of(sd, folder, tmp_path):
    sd.bare.save_pretrained(tmp_path / "another-model")
    from diffusers_sae import SAESteeringPipeline

    pipe = SAESteeringPipeline.from_pretrained(tmp_path / "another-model")
    with pytest.warns(UserWarning, match="trained on some/model and this pipeline is .*another-model"):
        pipe.load_sae(folder)
    with pytest.warns(UserWarning, match=r"trained at unet.up_blocks.1.attentions.1 and is loaded at .*@update"):
        sd.pipe.load_sae(folder, Site(SITE, kind="update"))
    sd.bare.save_pretrained(tmp_path / "model")
    same = SAESteeringPipeline.from_pretrained(tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same.load_sae(folder)


def test_a_site_that_never_ran_is_warned_of(sd, sae):
    sd.pipe.load_sae(sae, adapter_name="up1")
    sd.pipe.steer({3: 8.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd.run()
    from tiny import tiny_unet

    sd.pipe.register_modules(unet=tiny_unet())
    with pytest.warns(
        UserWarning, match="'up1' at unet.up_blocks.1.attentions.1 never acted, since the pipeline has another"
    ):
        sd.run()


def test_config_is_plain_json(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == "TopKSAE" and config["provenance"]["site"]["path"] == SITE


def test_large_files_stay_on_disk_until_they_are_needed(sd, sae, tmp_path, monkeypatch):
    """`add` reads its rows alone; what needs the code reads all, and checks it."""
    sae.save_pretrained(tmp_path)
    sd.pipe.load_sae(tmp_path, adapter_name="whole")
    sd.pipe.steer({3: 5.0}, adapter_name="whole")
    added = sd.run()
    sd.pipe.reset_steering()
    sd.pipe.steer({3: 0.5}, adapter_name="whole", mode="set")
    put = sd.run()
    sd.pipe.unload_sae()
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    sd.pipe.load_sae(tmp_path, adapter_name="lazy")
    lazy = sd.pipe._steering.loaded["lazy"].sae
    assert lazy.W_dec.device.type == "meta" and lazy.d_in == sae.d_in and lazy.n_latents == sae.n_latents
    sd.pipe.steer({3: 5.0})
    assert torch.equal(sd.run(), added)
    assert lazy.W_dec.device.type == "meta"
    sd.pipe.reset_steering()
    sd.pipe.steer({3: 0.5}, mode="set")
    assert torch.equal(sd.run(), put)
    assert lazy.W_dec.device.type == "cpu"


def test_a_large_file_that_was_altered_is_refused_when_it_is_read(sd, sae, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    sae.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    bare = sd.run()
    sd.pipe.load_sae(tmp_path)
    sd.pipe.steer({3: 0.5}, mode="set")
    with pytest.raises(InputError, match="does not have the checksum"):
        sd.run()
    sd.pipe.reset_steering()
    assert torch.equal(sd.run(), bare)


@pytest.mark.parametrize(
    "given", [{"k": 9}, {"n_latents": 16}, {"_class_name": "ReLUSAE"}, {"provenance": {"note": "x"}}]
)
def test_a_setting_that_contradicts_the_files_is_refused(sae, given, tmp_path):
    sae.save_pretrained(tmp_path)
    ((name, value),) = given.items()
    with pytest.raises(InputError) as error:
        load_sae(tmp_path, config=given)
    assert f"The config in {tmp_path} says {name} = " in str(error.value)
    assert f"and {name} = {value!r} was passed; leave it out" in str(error.value)


def test_a_setting_that_contradicts_a_torch_file_is_refused(sae, tmp_path):
    state = {"state_dict": sae.state_dict(), "k": 4}
    torch.save(state, tmp_path / "sae.pt")
    for source in (state, tmp_path / "sae.pt", tmp_path):
        assert load_sae(source).k == load_sae(source, config={"k": 4}).k == 4
        with pytest.raises(InputError, match="says k = 4, and k = 9 was passed; leave it out"):
            load_sae(source, config={"k": 9})


def test_the_same_setting_again_is_none_that_contradicts(tmp_path):
    MatryoshkaSAE(8, 32, 4, prefixes=(8, 32)).save_pretrained(tmp_path)
    assert load_sae(tmp_path, config={"k": 4, "prefixes": (8, 32), "format": "diffusers_sae"}).prefixes == (8, 32)
