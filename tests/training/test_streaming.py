"""Training on a running pipeline: several sites in one pass, and going on after a stop."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import SITE, Harness

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.capture import stream_activations
from diffusers_sae.training import SAETrainer, StreamingConfig, TrainingConfig, train_on_stream
from diffusers_sae.training.losses import fraction_of_variance_unexplained
from diffusers_sae.training.streaming import _first_steps, _SiteRun, timestep_weights

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
SITES = (SITE, "unet.mid_block")
CONFIG = StreamingConfig(images=24, batch_size=4, rows=128, reuse=8.0, buffer=2048, checkpoint_every=8)


def prompts(n=24):
    return [chr(97 + i % 26) * (1 + i % 3) for i in range(n)]


def run(folder, words=None, config=CONFIG):
    torch.manual_seed(0)
    makers = {site: lambda d: TopKSAE(d, 32, 4) for site in SITES}
    return train_on_stream(Harness().pipe, makers, words or prompts(), config, folder, training={"lr": 3e-3}, **CALL)


def test_a_run_that_is_done_gives_its_saes_again(tmp_path):
    first, again = run(tmp_path), run(tmp_path)
    for site in SITES:
        for a, b in zip(first[site].parameters(), again[site].parameters(), strict=True):
            assert torch.equal(a, b)


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
        state = torch.load(tmp_path / f"{site}.pt", weights_only=True)
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
        site = _SiteRun(SITE, lambda d: TopKSAE(d, 32, 4), CONFIG, tmp_path, {}, False)
        site.feed(rows, further)
        x, weight = site._buffer.rows[:, :-1], site._buffer.rows[:, -1]
        first = torch.cat([rows[0].flatten(0, 1), further.flatten(0, 2)])
        mine = (x[:, None] == first).all(-1).any(1)
        assert mine.sum() == len(first) and len(x) == rows[..., 0].numel() + further[..., 0].numel()
        weights[len(further)] = weight[mine].sum().item(), weight[~mine].sum().item()
        assert site.trainer.step_count == int(len(x) * CONFIG.reuse / CONFIG.rows)
    assert weights[0] == pytest.approx(weights[1])


def test_a_trained_sae_without_steps_is_what_it_was(tmp_path):
    sae = run(tmp_path / "first")[SITE]
    trainer = SAETrainer(copy.deepcopy(sae), TrainingConfig(steps=1), torch.randn(500, 8) * 3 + 1, trained=True)
    x = torch.randn(20, 8)
    torch.testing.assert_close(trainer.finish()(x), sae(x), atol=1e-5, rtol=1e-4)


def test_a_stopped_run_goes_on(tmp_path):
    def interrupted():
        for i, prompt in enumerate(prompts()):
            if i == 18:
                raise KeyboardInterrupt
            yield prompt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted())
    assert torch.load(tmp_path / f"{SITE}.pt", weights_only=True)["position"] == {"images": 16}
    run(tmp_path)
    state = torch.load(tmp_path / f"{SITE}.pt", weights_only=True)
    assert state["position"] == {"images": 24} and state["step_count"] == state["config"]["steps"]


def test_checkpoints_that_do_not_belong_together_are_refused(tmp_path):
    run(tmp_path)
    (tmp_path / f"{SITE}.pt").unlink()
    with pytest.raises(InputError, match="are of different images"):
        run(tmp_path)
