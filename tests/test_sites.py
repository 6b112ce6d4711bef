"""Sites: rows and back, and the sentences for sites that are none."""

import itertools
import warnings

import pytest
import torch
from conftest import SITE, Harness, random_sae
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_sae import InputError, SAESteeringPipeline, Site
from diffusers_sae.layouts import LAYOUTS
from diffusers_sae.sites import KINDS, STREAMS, grid_of, resolve, tensor_of, with_tensor
from diffusers_sae.widths import width_of

BLOCK = torch.nn.Identity()


ROWS = {"positions": (2, 15, 8), "channels": (2, 8, 15), "vector": (2, 1, 120)}
"""Of 8 channels at 15 places."""


@pytest.mark.parametrize("shape", [(2, 8, 3, 5), (2, 15, 8)])
@pytest.mark.parametrize("name", ROWS)
def test_rows_and_back_change_nothing(shape, name):
    x = torch.randn(shape)
    layout = LAYOUTS[name]
    rows = layout.to_rows(x)
    assert rows.shape == ROWS[name]
    assert torch.equal(layout.from_rows(rows, x), x)
    one = layout.from_rows(rows[:1, :1], x)  # a row for all images, and all rows of each
    assert torch.equal(layout.to_rows(one.expand(x.shape)), rows[:1, :1].expand(rows.shape))


def test_rows_are_what_they_are_called():
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(LAYOUTS["channels"].to_rows(x)[1, 6], x[1, 6].flatten())
    assert torch.equal(LAYOUTS["vector"].to_rows(x)[1, 0], x[1].flatten())


def test_row_p_of_a_map_is_its_place(sae):
    x = torch.randn(1, 8, 3, 5)
    rows = LAYOUTS["positions"].to_rows(x)
    assert torch.equal(rows[0, 1 * 5 + 2], x[0, :, 1, 2])


def test_grids():
    assert grid_of(torch.zeros(2, 8, 3, 5), (6, 10)) == (3, 5)
    assert grid_of(torch.zeros(2, 15, 8), (6, 10)) == (3, 5)
    with pytest.raises(InputError, match="15 tokens has no 7:7 grid"):
        grid_of(torch.zeros(2, 15, 8), (7, 7))


def test_outputs_are_rebuilt_and_not_changed():
    a, b = torch.zeros(1), torch.ones(1)
    for output in (a, (a,), (a, "residuals")):
        changed = with_tensor(output, b, BLOCK)
        assert type(changed) is type(output)
        assert tensor_of(changed, BLOCK) is b and tensor_of(output, BLOCK) is a
    assert with_tensor((a, "residuals"), b, BLOCK)[1] == "residuals"


def test_model_outputs_are_rebuilt():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    out = with_tensor(Transformer2DModelOutput(sample=torch.zeros(1)), torch.ones(1), BLOCK)
    assert isinstance(out, Transformer2DModelOutput) and out.sample.item() == 1


@pytest.mark.parametrize(
    "path",
    [
        SITE,
        "unet.mid_block",
        "unet.mid_block.attentions.0",
        "unet.up_blocks.0",
        "unet.down_blocks.0",
        "unet.down_blocks.0.resnets.0",
        "unet.mid_block.attentions.0.transformer_blocks.0",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2",
    ],
)
def test_block_sites_have_the_width_they_tell_and_can_be_steered(sd, path):
    with sd.pipe.capture([path]) as activations:
        bare = sd.run()
    rows = activations[path].rows("cond")
    told = width_of(resolve(sd.pipe, Site(path)))
    assert told in (None, rows.shape[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.pipe.load_sae(random_sae(rows.shape[-1]), path)
    assert torch.equal(bare, sd.run())
    sd.pipe.steer({0: 8.0})
    assert not torch.equal(bare, sd.run())


@pytest.mark.parametrize(
    ("site", "sentence"),
    [
        (
            "unet.up_blocks.1.attention.1",
            "does not exist in UNet2DConditionModel; the nearest are unet.up_blocks.1.attentions.1",
        ),
        ("unett.mid_block", "is not a site of StableDiffusionPipeline; a path starts with"),
        ("up_blocks.1.attentions.1", "a path starts with unet or text_encoder."),
        ("unet", "cannot be steered"),
        ("vae.decoder", "a path starts with unet or text_encoder."),
        ("text_encoder.layers.0", "does not exist in CLIPTextModel; the nearest are text_encoder."),
        ("unet.mid_block", "takes activations of width 8 and unet.mid_block has 16"),
    ],
)
def test_bad_sites_get_a_sentence_and_change_nothing(sd, sae, site, sentence):
    before = sd.run()
    with pytest.raises(InputError) as error:
        sd.pipe.load_sae(sae, site)
    assert sentence in str(error.value) and str(error.value).endswith(".")
    assert sd.pipe.get_list_saes() == {} and not sd.pipe.unet._forward_pre_hooks
    assert torch.equal(before, sd.run())


TEXTS = {
    "unet.mid_block": Site("unet.mid_block"),
    "unet.mid_block@input": Site("unet.mid_block", kind="input"),
    "transformer.transformer_blocks.0@text": Site("transformer.transformer_blocks.0", stream="text"),
    "unet.mid_block@update,channels": Site("unet.mid_block", kind="update", layout="channels"),
    "unet.mid_block@input,text,vector": Site("unet.mid_block", "input", "text", "vector"),
    "generator.w": Site("w"),
    "image_embeds": Site("image_embeds"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_a_site(text):
    assert str(TEXTS[text]) == text and Site.of(text) == TEXTS[text]
    assert Site.of(TEXTS[text].as_dict()) == TEXTS[text]


def test_every_site_has_a_text_of_its_own_that_can_name_a_folder(tmp_path):
    """None is another's, whatever the system makes of upper and lower case, and none has what Windows forbids."""
    sites = [Site("unet.mid_block", *each) for each in itertools.product(KINDS, STREAMS, LAYOUTS)]
    assert len({str(site).lower() for site in sites}) == len(sites)
    for site in sites:
        text = str(site)
        assert Site.of(text) == site and not set(text) & set('<>:"/\\|?* ') and not text.endswith(".")
        (tmp_path / text).mkdir()
    assert {Site.of(folder.name) for folder in tmp_path.iterdir()} == set(sites)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("unet.mid_block@channels,update", "unet.mid_block@update,channels"),
        ("unet.mid_block@vector,text,input", "unet.mid_block@input,text,vector"),
        ("unet.mid_block@update, channels", "unet.mid_block@update,channels"),
        ("unet.mid_block@output", "unet.mid_block"),
        ("unet.mid_block@positions,image,output", "unet.mid_block"),
        ("w@channels", "generator.w@channels"),
        ("text_encoder.text_model.encoder.layers.0", "text_encoder.encoder.layers.0"),
        ("text_encoder.text_model.encoder.layers.0@input", "text_encoder.encoder.layers.0@input"),
    ],
)
def test_other_spellings_are_the_same_site(text, same):
    assert Site.of(text) == Site.of(same) and str(Site.of(text)) == same


def test_wrappers_themselves_are_sites_of_their_own():
    """Without what they are called, nothing would be left of their paths."""
    sites = [Site(f"text_encoder.{name}") for name in ("text_model", "language_model", "model")]
    assert len(set(sites)) == 3 and [Site.of(str(site)) for site in sites] == sites


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("unet.mid_block@inptu", "'inptu' in 'unet.mid_block@inptu' is not a .* the nearest is 'input'"),
        ("unet.mid_block@channel", "the nearest is 'channels'"),
        ("unet.mid_block@Update", "the nearest is 'update'"),
        ("unet.mid_block@", "'' in 'unet.mid_block@' is not a kind, stream or layout"),
        ("unet.mid_block@input,", "'' in 'unet.mid_block@input,' is not"),
        ("unet.mid_block@input@text", "'input@text' in .* is not"),
        ("unet.mid_block@input,update", "says its kind twice, 'input' and 'update'"),
        ("unet.mid_block@text,input,image", "says its stream twice, 'text' and 'image'"),
        ("unet.mid_block@channels,channels", "says its layout twice"),
    ],
)
def test_texts_that_are_no_site(sd, sae, text, sentence):
    with pytest.raises(InputError, match=sentence):
        Site.of(text)
    with pytest.raises(InputError, match=sentence):
        sd.pipe.load_sae(sae, text)
    with pytest.raises(InputError, match=sentence), sd.pipe.capture([text]):
        pass


@pytest.mark.parametrize("kind", ["input", "update"])
@pytest.mark.parametrize("path", [f"{SITE}.proj_in", f"{SITE}.transformer_blocks.0.attn1"])
def test_a_stream_that_a_block_is_not_given(sd, path, kind):
    sentence = "is given no text stream .encoder_hidden_states"
    with pytest.raises(InputError, match=sentence), sd.pipe.capture([f"{path}@{kind},text"]):
        sd.run()


def test_a_text_is_not_a_path():
    with pytest.raises(InputError, match="pass Site.of\\('unet.mid_block@input'\\)"):
        Site("unet.mid_block@input")
    with pytest.raises(InputError, match="pass Site.of"):
        Site.of({"path": "unet.mid_block@input", "kind": "input"})


def test_an_sae_is_loaded_by_a_text(sd, sae):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.pipe.load_sae(sae, f"{SITE}@update")
    assert sd.pipe.get_list_saes()["default_0"]["site"] == f"{SITE}@update"


def test_an_sae_that_says_its_site_by_a_text(sd, sae):
    sae.register_to_config(provenance={"site": f"{SITE}@input"})
    sd.pipe.load_sae(sae)
    assert sd.pipe.get_list_saes()["default_0"]["site"] == f"{SITE}@input"


@pytest.mark.parametrize("wrong", [{"kind": "outside"}, {"stream": "audio"}, {"layout": "rings"}])
def test_bad_kinds_of_site(wrong):
    with pytest.raises(InputError, match="choose one of"):
        Site(SITE, **wrong)


def test_a_width_that_only_the_run_shows(sae):
    """A wrong width at a module that does not tell its own stops the call, and the pipeline runs on without the SAE."""
    harness = Harness()
    path = "unet.mid_block.attentions.0.transformer_blocks.0.norm1"
    bare = harness.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        harness.pipe.load_sae(sae, path)
    harness.pipe.steer({0: 1.0})
    with pytest.raises(InputError, match="takes activations of width 8 and .* has 16"):
        harness.run()
    harness.pipe.unload_sae()
    assert torch.equal(bare, harness.run())


def test_pipelines_without_a_guided_unet_are_refused(sae):
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    pipe = SAESteeringPipeline.from_pipe(DDPMPipeline(unet, DDPMScheduler()))
    with pytest.raises(InputError, match="does not say whether guidance is on"):
        pipe.load_sae(sae, "unet.mid_block")
    with pytest.raises(InputError, match="from_pipe takes a diffusers pipeline, not int"):
        SAESteeringPipeline.from_pipe(3)
