"""Training on a running pipeline: several sites in one pass, and going on after a stop."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import SITE, Harness, Stop

from diffusers_sae import InputError, Site, TopKSAE
from diffusers_sae.capture import ShuffleBuffer, stream_activations
from diffusers_sae.disk import hold_folder
from diffusers_sae.saes import ReLUSAE
from diffusers_sae.training import SAETrainer, StreamedSAE, StreamingConfig, TrainingConfig, train_on_stream
from diffusers_sae.training.losses import fraction_of_variance_unexplained
from diffusers_sae.training.site_training import SAERun, SiteTraining, timestep_weights
from diffusers_sae.training.streaming import _first_steps

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
SITES = (SITE, "unet.mid_block")
CONFIG = StreamingConfig(images=24, batch_size=4, rows=128, reuse=8.0, buffer=2048, checkpoint_every=8)


def prompts(n=24):
    return [chr(97 + i % 26) * (1 + i % 3) for i in range(n)]


def run(folder, words=None, config=CONFIG):
    torch.manual_seed(0)
    makers = {site: lambda d: TopKSAE(d, 32, 4) for site in SITES}
    return train_on_stream(Harness().pipe, makers, words or prompts(), config, folder, training={"lr": 3e-3}, **CALL)


def saved(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def test_a_run_that_is_done_gives_its_saes_again(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    for site in SITES:
        for a, b in zip(first[site].parameters(), again[site].parameters(), strict=True):
            assert torch.equal(a, b)


KINDS_OF_A_PATH = [SITE, f"{SITE}@input", f"{SITE}@update", "unet.mid_block@update"]


def make_from_seed(d):
    torch.manual_seed(d)
    return TopKSAE(d, 32, 4)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, emphasis=2.0, first_steps=2, buffer=300)])
def test_kinds_of_one_path_at_once_are_trained_as_each_alone(tmp_path, config):
    def trained(texts, folder):
        makers = {Site.of(text): make_from_seed for text in texts}
        return train_on_stream(Harness().pipe, makers, prompts(), config, folder, training={"lr": 3e-3}, **CALL)

    together = trained(KINDS_OF_A_PATH, tmp_path / "together")
    assert list(together) == [Site.of(text) for text in KINDS_OF_A_PATH]
    assert {path.name for path in (tmp_path / "together").glob("*.jsonl")} == {f"{t}.jsonl" for t in KINDS_OF_A_PATH}
    for text in KINDS_OF_A_PATH:
        alone = trained([text], tmp_path / text)[Site.of(text)]
        for a, b in zip(together[Site.of(text)].parameters(), alone.parameters(), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(together[Site(SITE)].W_dec, together[Site(SITE, kind="input")].W_dec)


def test_kinds_of_one_path_go_on_after_a_stop(tmp_path, steps_left):
    def trained(folder, texts=KINDS_OF_A_PATH):
        makers = dict.fromkeys(texts, make_from_seed)
        return train_on_stream(Harness().pipe, makers, prompts(), CONFIG, folder, training={"lr": 3e-3}, **CALL)

    whole = trained(tmp_path / "whole")
    steps_left[:] = [-steps_left[0] // 2]
    with pytest.raises(Stop):
        trained(tmp_path / "stopped")
    assert set(saved(tmp_path / "stopped")["sites"]) == set(KINDS_OF_A_PATH)
    steps_left[:] = [0]
    with pytest.raises(InputError, match="is of another run"):
        trained(tmp_path / "stopped", [SITE, f"{SITE}@input", f"{SITE}@channels", "unet.mid_block@update"])
    again = trained(tmp_path / "stopped")
    for text in KINDS_OF_A_PATH:
        for a, b in zip(whole[text].parameters(), again[text].parameters(), strict=True):
            assert torch.equal(a, b)


def test_saes_of_one_site_in_several_spellings_share_its_buffer(tmp_path):
    texts = ["unet.mid_block@update,positions", "unet.mid_block@update"]
    saes = {f"sae {i}": StreamedSAE(text, make_from_seed) for i, text in enumerate(texts)}
    saes["sae 2"] = StreamedSAE(Site("unet.mid_block", kind="update"), make_from_seed)
    trained = train_on_stream(Harness().pipe, saes, prompts(), CONFIG, tmp_path, training={"lr": 3e-3}, **CALL)
    assert list(saved(tmp_path)["sites"]) == ["unet.mid_block@update"]
    assert torch.equal(trained["sae 0"].W_dec, trained["sae 2"].W_dec)


@pytest.mark.parametrize(
    ("saes", "sentence"),
    [
        ({SITE: TopKSAE, Site(SITE): TopKSAE}, f"The site {SITE} is named twice"),
        ({SITE: TopKSAE, f"{SITE}@output": TopKSAE}, "is named twice, as"),
        ({SITE: TopKSAE, Site(SITE): StreamedSAE("unet.mid_block", TopKSAE)}, f"Two SAEs are named '{SITE}'"),
        ({f"{SITE}@inptu": TopKSAE}, "the nearest is 'input'"),
        ({"a": StreamedSAE(f"{SITE}@inptu", TopKSAE)}, "the nearest is 'input'"),
    ],
)
def test_a_site_or_a_name_twice_is_refused(tmp_path, saes, sentence):
    with pytest.raises(InputError, match=sentence):
        train_on_stream(None, saes, prompts(), CONFIG, tmp_path / "new", **CALL)
    assert not (tmp_path / "new").exists()


def test_timesteps_weigh_alike_however_much_they_vary():
    rows = torch.randn(3, 50, 4, 8) * torch.tensor([1.0, 5.0, 0.2])[:, None, None, None]
    weights = timestep_weights(rows)
    assert weights.shape == (3, 50, 4, 1)
    weighted = (weights * (rows - rows.mean((1, 2), keepdim=True)).square()).sum((1, 2, 3))
    torch.testing.assert_close(weighted, weighted.mean().expand(3))


def test_every_site_gets_an_sae_that_has_learned(tmp_path):
    saes = run(tmp_path)
    assert {site: sae.d_in for site, sae in saes.items()} == {SITE: 8, "unet.mid_block": 16}
    for site in SITES:
        log = [json.loads(line) for line in (tmp_path / f"{site}.jsonl").read_text().splitlines()]
        assert [entry["images"] for entry in log] == [8, 16, 24]
        assert log[-1]["fvu"] < 0.9 * log[0]["fvu"]
        state = saved(tmp_path)["sites"][site]["saes"][site]
        rows = 24 * 3 * (64 if site == SITE else 16)
        assert state["step_count"] == state["config"]["steps"] == int(rows * 8 / 128)


def fvu_by_timestep(sae, site=SITE):
    pipe = Harness().pipe
    (batch,) = stream_activations(pipe, [site], prompts(16), batch_size=16, seed=999, **CALL)
    rows, timesteps = batch.rows(site, "cond")
    with torch.no_grad():
        flat = [x.flatten(0, 1) for x in rows]
        return {
            float(t): fraction_of_variance_unexplained(x, sae(x)).item() for x, t in zip(flat, timesteps, strict=True)
        }


def test_emphasis_presses_down_the_hardest_timestep_of_trained_saes(tmp_path):
    sae = run(tmp_path / "first")[SITE]
    before = fvu_by_timestep(sae)
    hardest, easiest = max(before, key=before.get), min(before, key=before.get)
    ratios = {}
    for emphasis in (0.0, 6.0):
        config = replace(CONFIG, images=48, seed=100, emphasis=emphasis)
        again = train_on_stream(
            Harness().pipe, {SITE: lambda d: copy.deepcopy(sae).train()}, prompts(48), config,
            tmp_path / str(emphasis), training={"lr": 3e-3}, trained=True, **CALL,
        )[SITE]  # fmt: skip
        after = fvu_by_timestep(again)
        assert sum(after.values()) < sum(before.values())
        ratios[emphasis] = after[hardest] / after[easiest]
    assert ratios[6.0] < 0.9 * ratios[0.0]


def test_further_first_steps_are_other_noises_of_the_same_prompts(sd, tmp_path):
    (batch,) = stream_activations(sd.pipe, [SITE], prompts(4), batch_size=4, **CALL)
    further = _first_steps(sd.pipe, batch, replace(CONFIG, first_steps=3), CALL)
    rows, more = batch.rows(SITE)[0], further.rows(SITE)[0]
    assert further.prompts == prompts(4) * 3 and more.shape == (1, 12, *rows.shape[2:])
    generators = [torch.Generator().manual_seed(2**40 + i) for i in range(12)]
    with sd.pipe.capture([SITE]) as direct:
        sd.run(prompt=further.prompts, generator=generators, num_inference_steps=3)
    t = direct[SITE].timestep[0].item()
    torch.testing.assert_close(more[0], direct[SITE].rows("cond", t), atol=1e-5, rtol=1e-4)


def test_further_first_steps_share_the_weight_of_their_timestep(tmp_path):
    rows, more = torch.randn(3, 4, 16, 8) * torch.tensor([3.0, 1.0, 0.5])[:, None, None, None], torch.randn(1, 8, 16, 8)
    weights = {}
    for further in (rows[:0], more):
        one = SAERun(tmp_path / "log.jsonl", lambda d: TopKSAE(d, 32, 4), {}, False)
        site = SiteTraining(SITE, {SITE: one}, CONFIG)
        site.feed(rows, further)
        x, weight = site._buffer.rows[:, :-1], site._buffer.rows[:, -1]
        first = torch.cat([rows[0].flatten(0, 1), further.flatten(0, 2)])
        mine = (x[:, None] == first).all(-1).any(1)
        assert mine.sum() == len(first) and len(x) == rows[..., 0].numel() + further[..., 0].numel()
        weights[len(further)] = weight[mine].sum().item(), weight[~mine].sum().item()
        assert one.trainer.step_count == int(len(x) * CONFIG.reuse / CONFIG.rows)
    assert weights[0] == pytest.approx(weights[1])


def test_a_trained_sae_without_steps_is_what_it_was(tmp_path):
    sae = run(tmp_path / "first")[SITE]
    trainer = SAETrainer(copy.deepcopy(sae), TrainingConfig(steps=1), torch.randn(500, 8) * 3 + 1, trained=True)
    x = torch.randn(20, 8)
    torch.testing.assert_close(trainer.finish()(x), sae(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, emphasis=2.0, first_steps=2, buffer=300)])
def test_a_run_that_is_stopped_ends_with_the_same_bits(tmp_path, steps_left, config):
    expected = run(tmp_path / "whole", config=config)
    steps, reached = -steps_left[0], []
    for moment in (3, steps * 45 // 100, steps // 2):  # before the first checkpoint, and between others
        steps_left[:] = [moment]
        torch.manual_seed(moment)  # what else is drawn must not matter
        with pytest.raises(Stop):
            run(tmp_path / "stopped", config=config)
        there = (tmp_path / "stopped" / "checkpoint.pt").exists()
        reached.append(saved(tmp_path / "stopped")["images"] if there else 0)
    assert reached == sorted(set(reached)) and reached[0] == 0 and reached[-1] < 24, reached
    steps_left[:] = [0]
    found = run(tmp_path / "stopped", config=config)
    for site in SITES:
        for a, b in zip(found[site].parameters(), expected[site].parameters(), strict=True):
            assert torch.equal(a, b)
        log = (tmp_path / "whole" / f"{site}.jsonl").read_text()
        assert (tmp_path / "stopped" / f"{site}.jsonl").read_text() == log


def again(folder, pipe=None, k=4, cls=TopKSAE, words=None, sites=SITES, config=CONFIG, training=None, **call):
    makers = {site: lambda d: cls(d, 32, *([k] if cls is TopKSAE else [])) for site in sites}
    arguments = {"training": {"lr": 3e-3, **(training or {})}, **CALL, **call}
    return train_on_stream(pipe or Harness().pipe, makers, words or prompts(), config, folder, **arguments)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    run(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": replace(CONFIG, rows=64)}, "run: config.rows is 128 in the checkpoint and 64 here; delete it to"),
        ({"config": replace(CONFIG, seed=1)}, "config.seed is 0 in the checkpoint and 1 here"),
        ({"sites": (SITE,)}, "run: saes.unet.mid_block is .* in the checkpoint and nothing here"),
        ({"training": {"lr": 1e-3}}, "training.lr is 0.003 in the checkpoint and 0.001 here"),
        ({"training": {"k_aux": 8}}, "training.k_aux is 64 in the checkpoint and 8 here"),
        ({"k": 9}, "sae.k is 4 in the checkpoint and 9 here"),
        ({"cls": ReLUSAE}, "sae.class is TopKSAE in the checkpoint and ReLUSAE here"),
        ({"words": ["x"] * 24}, "run: prompts has other contents"),
        ({"num_inference_steps": 7}, "run: call.num_inference_steps is 3 in the checkpoint and 7 here"),
        ({"height": 32}, "run: call.height is 16 in the checkpoint and 32 here"),
        ({"callback_on_step_end": lambda pipe, step, t, kept: kept}, "call.callback_on_step_end is nothing in"),
        ({"trained": True}, "run: trained is false in the checkpoint and true here"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(done, change, sentence):
    before = {file.name: file.read_bytes() for file in done.iterdir()}
    with pytest.raises(InputError, match=sentence):
        again(done, **change)
    assert {file.name: file.read_bytes() for file in done.iterdir()} == before


def test_a_checkpoint_of_another_pipeline_is_refused(done):
    pipe = Harness().pipe
    with torch.no_grad():
        pipe.unet.conv_out.weight[-1, -1, -1, -1] += 0.5
    with pytest.raises(InputError, match="run: model.weights.unet has other contents; delete it to begin anew"):
        again(done, pipe)


def test_a_run_goes_on_with_another_interval_of_checkpoints_and_with_prompts_that_it_does_not_take(done, steps_left):
    steps_left[:] = [1]
    again(done, config=replace(CONFIG, checkpoint_every=5), words=prompts(30))


def test_another_trained_sae_to_go_on_with_is_refused(tmp_path):
    sae = run(tmp_path / "first")[SITE]

    def further(factor):
        def make(d):
            new = copy.deepcopy(sae).train()
            new.W_enc.data *= factor
            return new

        makers, folder = {SITE: make}, tmp_path / "further"
        return train_on_stream(Harness().pipe, makers, prompts(), CONFIG, folder, trained=True, **CALL)[SITE]

    first, second = further(1.0), further(1.0)
    assert torch.equal(first.W_enc, second.W_enc)
    with pytest.raises(InputError, match="start has other contents; delete it to begin anew"):
        further(1.5)


def test_what_is_refused_leaves_no_folder_and_a_folder_in_use_is_left_alone(tmp_path):
    for change, sentence in (
        ({"words": prompts(6)}, "There are 6 prompts for 24 images; give one for each"),
        ({"words": "abcdefghijklmnopqrstuvwxyz"}, "prompts takes a list of prompts"),
        ({"sites": ("unet.nowhere",)}, "'unet.nowhere' does not exist"),
        ({"config": replace(CONFIG, branch="perturbed")}, "held no rows of the branch 'perturbed'"),
    ):
        with pytest.raises(InputError, match=sentence):
            again(tmp_path / "new" / "sae", **change)
        assert not (tmp_path / "new").exists()
    with hold_folder(tmp_path / "sae"), pytest.raises(InputError, match="Another process is writing"):
        again(tmp_path / "sae")


def test_what_a_kill_leaves_of_the_log_is_cut(tmp_path, steps_left):
    """It is written before the checkpoint, and a kill between the two leaves a line too many, or half of one."""
    run(tmp_path / "whole")
    steps_left[:] = [150]
    with pytest.raises(Stop):
        run(tmp_path / "stopped")
    steps_left[:] = [0]
    log = tmp_path / "stopped" / f"{SITE}.jsonl"
    assert log.exists()
    with log.open("a") as file:
        file.write('{"images": 16, "fvu": 0.5}\n{"images": 24, "fv')
    run(tmp_path / "stopped")
    assert log.read_text() == (tmp_path / "whole" / f"{SITE}.jsonl").read_text()


def test_several_saes_of_a_site_are_what_each_would_be_alone(tmp_path):
    """A sweep in one generation pass: same rows, same order, so the same bits as in a pass of its own."""

    def make(cls, seed, *arguments):
        def new(d):
            torch.manual_seed(seed)
            return cls(d, 32, *arguments)

        return new

    asked = {
        "k 4": StreamedSAE(SITE, make(TopKSAE, 1, 4)),
        "k 8": StreamedSAE(SITE, make(TopKSAE, 2, 8), {"lr": 1e-3}),
        "relu": StreamedSAE(SITE, make(ReLUSAE, 3), {"sparsity": 0.3}),
    }

    def trained(names, folder):
        saes = {name: asked[name] for name in names}
        return train_on_stream(Harness().pipe, saes, prompts(), CONFIG, folder, training={"lr": 3e-3}, **CALL)

    together = trained(asked, tmp_path / "all")
    assert list(together) == list(asked) and together["k 8"].k == 8
    assert json.loads((tmp_path / "all" / "relu.jsonl").read_text().splitlines()[-1])["images"] == 24
    states = saved(tmp_path / "all")["sites"][SITE]["saes"]
    rates = {name: state["config"]["lr"] for name, state in states.items()}
    assert rates == {"k 4": 3e-3, "k 8": 1e-3, "relu": 3e-3}
    for name in asked:
        alone = trained([name], tmp_path / name)[name]
        for a, b in zip(together[name].parameters(), alone.parameters(), strict=True):
            assert torch.equal(a, b), name


def test_a_run_ends_with_a_checkpoint_wherever_its_images_end(tmp_path, steps_left):
    config = replace(CONFIG, images=10)  # neither whole batches nor whole spans between checkpoints
    first = run(tmp_path, config=config)  # of 24 prompts
    assert saved(tmp_path)["images"] == 10
    steps_left[:] = [1]  # none is made again
    again = run(tmp_path, config=config)
    for site in SITES:
        assert [json.loads(x)["images"] for x in (tmp_path / f"{site}.jsonl").read_text().splitlines()] == [8, 10]
        assert all(torch.equal(a, b) for a, b in zip(first[site].parameters(), again[site].parameters(), strict=True))


@pytest.mark.parametrize("images", [4, 3])
def test_a_batch_larger_than_the_buffer_is_fed_in_parts_that_hold_every_timestep(images):
    """Each row comes once, in parts of at most half a buffer, and steps are made in between."""
    config = replace(CONFIG, images=images, batch_size=images, rows=32, reuse=1.0, buffer=64, balance=False)
    rows = torch.arange(5 * images * 16.0).view(5, images, 16, 1).expand(-1, -1, -1, 8) + torch.rand(8)
    more = 1e4 + torch.arange(2 * 16.0).view(1, 2, 16, 1).expand(-1, -1, -1, 8)
    run = SAERun(None, lambda d: TopKSAE(d, 32, 4), {}, False)
    site, parts = SiteTraining(SITE, {SITE: run}, config), []
    add = ShuffleBuffer.add

    def watching(self, part):
        parts.append(part)
        steps.append(run.trainer.step_count)
        add(self, part)

    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShuffleBuffer, "add", watching)
        site.feed(rows, more)
    count = rows[..., 0].numel() + 32
    own = [part for part in parts if len(part) == 5]
    assert len(own) == -(-2 * count // 64) and steps[-1] > 0
    assert run.trainer.step_count == run.trainer.config.steps == count // 32
    for part in own:  # the same places at every timestep
        places = part[..., 0] - part[:1, ..., 0]
        torch.testing.assert_close(places, places[:, :, :1].expand_as(places))
    fed = torch.cat([part.flatten(0, 2)[:, 0] for part in parts])
    everything = torch.cat([rows.flatten(0, 2)[:, 0], more.flatten(0, 2)[:, 0]])
    assert torch.equal(fed.sort().values, everything.sort().values)
    held = torch.cat([own[0][t, 0, :, 0] for t in range(5)])
    assert held.tolist() != rows[:, 0, : own[0].shape[2], 0].flatten().tolist()  # of a random choice of places


def test_a_run_through_a_small_buffer_resumes_with_the_same_bits(tmp_path, steps_left):
    config = replace(CONFIG, images=12, rows=64, reuse=1.0, buffer=128, checkpoint_every=4)

    def train(folder):
        makers = {SITE: lambda d: TopKSAE(d, 32, 4)}
        torch.manual_seed(0)
        return train_on_stream(Harness().pipe, makers, prompts(12), config, folder, training={"lr": 3e-3}, **CALL)

    expected = train(tmp_path / "whole")[SITE].state_dict()
    for moment in (14, 15):
        steps_left[:] = [moment]
        with pytest.raises(Stop):
            train(tmp_path / "stopped")
    steps_left[:] = [0]
    again = train(tmp_path / "stopped")[SITE].state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


BAD = {
    "images": (0, -1, 2.5), "batch_size": (0, -4), "rows": (1, 0, -8), "reuse": (0, -1.0, float("nan")),
    "buffer": (0, -1, 100), "emphasis": (-1.0, float("inf")), "first_steps": (-1,), "checkpoint_every": (0, -1),
    "seed": (0.5, None),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        StreamingConfig(**{"images": 4, "rows": 128, "buffer": 2048, name: value})


@pytest.mark.parametrize(
    ("training", "sentence"), [({"lr": -1.0}, "lr=-1.0 must be"), ({"rate": 1}, "training has rate; choose from")]
)
def test_settings_of_training_are_checked_before_anything_is_generated(tmp_path, training, sentence):
    with pytest.raises(InputError, match=sentence):
        train_on_stream(None, {SITE: TopKSAE}, prompts(), CONFIG, tmp_path / "new", training=training, **CALL)
    assert not (tmp_path / "new").exists()


def test_too_few_rows_for_a_step_are_refused():
    site = SiteTraining(
        SITE, {SITE: SAERun(None, lambda d: TopKSAE(d, 32, 4), {}, False)}, replace(CONFIG, images=1, reuse=1.0)
    )
    with pytest.raises(InputError, match="images=1 give 48 rows of .*, too few for a step of rows=128"):
        site.feed(torch.randn(3, 1, 16, 8), torch.randn(3, 1, 16, 8)[:0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_are_refused_by_their_step(bad):
    run = SAERun(None, lambda d: TopKSAE(d, 32, 4), {}, False)
    site, rows = SiteTraining(SITE, {SITE: run}, CONFIG), torch.randn(3, 4, 16, 8)
    site.feed(rows, rows[:0])
    before = copy.deepcopy(run.trainer.state_dict()["sae"])
    rows[2, 1, 3, 4] = bad
    with pytest.raises(InputError, match="held numbers that are not finite at step 2; run the pipeline in fp32"):
        site.feed(rows, rows[:0])
    assert all(torch.equal(a, b) for a, b in zip(run.trainer.sae.state_dict().values(), before.values(), strict=True))


def test_timesteps_without_spread_weigh_one_and_do_not_break_a_run():
    rows = torch.randn(4, 50, 4, 8) * torch.tensor([1.0, 0.0, 3.0, 0.1])[:, None, None, None] + 5
    weights = timestep_weights(rows)[:, 0, 0, 0]
    variance = rows.flatten(1, 2).var(1).sum(-1)[[0, 2, 3]]
    assert weights[1] == 1
    torch.testing.assert_close(weights[[0, 2, 3]], variance.mean() / variance)
    assert timestep_weights(rows[:, :1, :1]).flatten().tolist() == [1, 1, 1, 1]  # one row per timestep
    run = SAERun(None, lambda d: TopKSAE(d, 32, 4), {}, False)
    site = SiteTraining(SITE, {SITE: run}, replace(CONFIG, emphasis=1.0, reuse=1.0))
    for _ in range(3):
        site.feed(rows, rows[:0])
    assert 0 < run.figures["fvu"] < 100 and site._hardness.isfinite().all()
