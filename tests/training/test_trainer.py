"""The trainer: losses against their definitions, gradients, folding of the scale, resumption."""

import copy

import pytest
import torch
from conftest import random_sae
from kinds import KINDS, of_kind
from torch.utils._pytree import tree_leaves

from diffusers_sae import Directions, InputError, ReLUSAE, TopKSAE
from diffusers_sae.capture.descriptions import describe
from diffusers_sae.training import SAETrainer, TrainingConfig
from diffusers_sae.training.checkpoints import read_checkpoint, write_checkpoint
from diffusers_sae.training.losses import aux_k_loss, fraction_of_variance_unexplained
from diffusers_sae.training.objectives import objective
from diffusers_sae.training.optimizers import OPTIMIZERS
from diffusers_sae.training.trainer import geometric_median


def sparse_data(n, d=32, features=48, active=3, seed=0):
    """Rows made of a few of 48 random directions, around a mean that is far from zero."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(
        torch.randn(features, d, generator=torch.Generator().manual_seed(5)), dim=-1
    )
    codes = torch.zeros(n, features)
    picks = torch.rand(n, features, generator=generator).topk(active).indices
    codes.scatter_(1, picks, torch.rand(n, active, generator=generator) * 4 + 1)
    return codes @ directions + 3.0, directions


def trainer_for(sae, steps=300, **config):
    data, _ = sparse_data(4096)
    return SAETrainer(sae, TrainingConfig(steps=steps, batch_size=256, **{"dead_after": 2000, **config}), data), data


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_recovers_the_features_and_folds_the_scale(optimizer):
    torch.manual_seed(0)
    sae = TopKSAE(32, 64, 3)
    trainer, data = trainer_for(sae, steps=1500, lr=4e-3, optimizer=optimizer)
    for _ in range(1500):
        trainer.step(data[torch.randint(0, 4096, (256,))])
    trainer.finish()
    fresh, directions = sparse_data(2000, seed=9)
    assert fraction_of_variance_unexplained(fresh, sae(fresh)) < 0.05
    found = (directions @ sae.W_dec.T).amax(1)
    assert (found > 0.9).float().mean() > 0.9
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(64))


def test_fvu_of_the_mean_is_one_and_of_the_data_zero():
    x = torch.randn(50, 4) + 3
    assert fraction_of_variance_unexplained(x, x).item() == 0
    torch.testing.assert_close(fraction_of_variance_unexplained(x, x.mean(0).expand_as(x)), torch.tensor(1.0))


def test_weights_multiply_the_terms_of_fvu():
    torch.manual_seed(0)
    trainer, data = trainer_for(TopKSAE(32, 64, 3), precision="float32")
    x, w = data[:100], torch.rand(100)
    with torch.no_grad():
        x_hat = trainer.sae(x * trainer.scale) / trainer.scale
    error, spread = ((x - x_hat) ** 2).sum(1), ((x - x.mean(0)) ** 2).sum(1)
    assert trainer.step(x, w)["fvu"] == pytest.approx(float((w * error).sum() / (w * spread).sum()), rel=1e-4)


def test_aux_loss_equals_its_definition():
    sae = random_sae()
    x = torch.randn(20, 8)
    dead = torch.arange(32) % 2 == 0
    residual = (x - sae(x)).detach()
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).masked_fill(~dead, -torch.inf)
    code = torch.zeros(20, 32)
    top = pre.topk(4)  # a quarter of the 16 dead
    code.scatter_(1, top.indices, top.values.relu())
    expected = (residual - code @ sae.W_dec).square().sum() / residual.square().sum()
    loss = aux_k_loss(sae, x, sae(x), dead, 5)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert sae.W_dec.grad[~dead].abs().max() == 0 and sae.W_dec.grad[dead].abs().max() > 0
    assert aux_k_loss(sae, x, sae(x), torch.zeros(32, dtype=torch.bool), 5) == 0


@pytest.mark.parametrize("clip", [1e9, 0.01])
@pytest.mark.parametrize("latents", [32, 1500])  # one block of rows, and several
@pytest.mark.parametrize("decoder_norm", [1.0, 3.0])  # of an SAE that others trained
def test_an_update_is_adams_on_the_clipped_gradient_across_the_decoder_rows(clip, latents, decoder_norm):
    torch.manual_seed(0)
    sae = random_sae(n_latents=latents)
    sae.W_dec.data *= decoder_norm
    data = torch.randn(256, 8)
    trainer = SAETrainer(sae, TrainingConfig(50, 256, lr=1e-2, clip=clip, precision="float32"), data, trained=True)
    reference = copy.deepcopy(sae).double()
    adam = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for step in range(3):
        loss = objective(reference, data.double() * trainer.scale, None, 1.0, 0.1).loss
        adam.zero_grad()
        loss.backward()
        norms = reference.W_dec.norm(dim=-1, keepdim=True)
        directions = reference.W_dec.detach() / norms.detach()
        reference.W_dec.grad -= (reference.W_dec.grad * directions).sum(-1, keepdim=True) * directions
        torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
        adam.param_groups[0]["lr"] = 1e-2 * trainer.rate()
        adam.step()
        with torch.no_grad():
            reference.W_dec /= reference.W_dec.norm(dim=-1, keepdim=True)
        trainer.step(data)
        for (name, a), b in zip(sae.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=1e-3, msg=f"{name} at step {step}")


def test_geometric_median_is_not_moved_by_outliers():
    x = torch.randn(1001, 4)
    x[:100] += 1000
    assert geometric_median(x).norm() < 1 < x.mean(0).norm()


def test_dead_latents_are_revived():
    torch.manual_seed(0)

    def dead_share(weight):
        torch.manual_seed(0)
        sae = TopKSAE(32, 64, 3)
        sae.b_enc.data[32:] = -9.0  # half of them are negative on every row
        trainer, data = trainer_for(sae, steps=600, aux_weight=weight, lr=4e-3)
        for _ in range(600):
            trainer.step(data[torch.randint(0, 4096, (256,))])
        trainer.finish()
        return (sae.encode(data) > 0).any(0).logical_not().float().mean().item()

    assert dead_share(0.0) == 0.5 and dead_share(1 / 32) < 0.05


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_training_equals_uninterrupted(tmp_path, optimizer):
    def run(interrupt):
        torch.manual_seed(0)
        sae = TopKSAE(32, 64, 3)
        trainer, data = trainer_for(sae, steps=40, optimizer=optimizer)
        for i in range(40):
            if interrupt and i == 17:
                write_checkpoint(tmp_path / "checkpoint.pt", trainer.state_dict())
                trainer, _ = trainer_for(TopKSAE(32, 64, 3), steps=40, optimizer=optimizer)
                trainer.load_state_dict(read_checkpoint(tmp_path / "checkpoint.pt"))
            trainer.step(data[i * 64 : (i + 1) * 64])
        return trainer.finish()

    for a, b in zip(run(False).parameters(), run(True).parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("sae", "config", "sentence"),
    [
        (lambda: TopKSAE(32, 64, 3), {"steps": 41}, "run: training.steps is 40 in the checkpoint and 41 here; delete"),
        (lambda: TopKSAE(32, 64, 9), {}, "run: sae.k is 3 in the checkpoint and 9 here"),
        (lambda: TopKSAE(32, 64, 3, relu=False), {}, "run: sae.relu is true in the checkpoint and false here"),
        (lambda: ReLUSAE(32, 64), {}, "run: sae.class is TopKSAE in the checkpoint and ReLUSAE here"),
    ],
)
def test_the_state_of_another_run_is_refused(sae, config, sentence):
    trainer, data = trainer_for(TopKSAE(32, 64, 3), steps=40)
    trainer.step(data[:64])
    other, _ = trainer_for(sae(), **{"steps": 40, **config})
    before = describe(other.state_dict())
    with pytest.raises(InputError, match=sentence):
        other.load_state_dict(trainer.state_dict())
    assert describe(other.state_dict()) == before


def damaged(state, change):
    if change == "no sae":
        del state["sae"]
    if change == "no weights":
        del state["sae"]["W_dec"]
    if change == "cut weights":
        state["sae"]["W_enc"] = state["sae"]["W_enc"][:5]
    if change == "cut moments":
        state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    if change == "no optimizer":
        state["optimizer"] = {}
    if change == "cut counts":
        state["rows_since_fired"] = state["rows_since_fired"][:5]
    if change == "no config":
        state["config"] = None
    if change == "no average":
        state["average"] = None
    if isinstance(change, dict):
        return {**state, **change}
    if isinstance(change, tuple):
        *path, last, value = change
        inner = state
        for name in path:
            inner = inner[name]
        inner[last] = value
    if change == "older":
        del state["description"]
    if change == "foreign":
        return [1, 2]
    return state


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("no sae", "The checkpoint has no sae, so it is no checkpoint of this; delete it to begin anew"),
        ("no weights", r"has no weights W_dec of shape \(64, 32\), so it is damaged; delete it to begin anew"),
        ("cut weights", r"has no weights W_enc of shape \(64, 32\)"),
        ("cut moments", "has no moment 0 exp_avg of shape"),
        ("no optimizer", "The checkpoint's optimizer has no state, param_groups"),
        ("cut counts", r"has no count rows_since_fired of shape \(64,\)"),
        ("no config", "The checkpoint's config has no steps"),
        ("no average", "The checkpoint's average has no decay, .*shadow_params"),
        ("older", "is of an older version and does not say of which SAE; delete it"),
        ("foreign", "The checkpoint has no sae, optimizer"),
        *(({"scale": scale}, "scale is .*damaged; delete") for scale in (-1.0, 0.0, float("nan"), "1", None, 1)),
        *(({"step_count": steps}, "step_count is .*damaged; delete") for steps in (-1, 41, 1.0, True, None, "1")),
        ({"sae": 3}, "has no weights W_dec"),
        ({"rows_since_fired": torch.zeros(64)}, "rows_since_fired is of torch.float32 and not of torch.int64"),
        ({"rows_since_fired": -torch.ones(64, dtype=torch.long)}, "rows_since_fired holds numbers that it cannot"),
        ({"config": {"steps": torch.ones(2)}}, "config.steps is a Tensor, so the checkpoint is damaged"),
        ({"description": torch.ones(2)}, "description is a Tensor"),
        (("config", "precision", ["float32"]), "training.precision is"),
        (
            ("sae", "W_enc", torch.zeros(64, 32, dtype=torch.int8)),
            "weights W_enc is of torch.int8 and not",
        ),
        (("sae", "W_enc", torch.full((64, 32), torch.nan)), "weights W_enc holds numbers that it cannot have"),
        (("optimizer", "state", {}), "The checkpoint's optimizer has no 0"),
        (("optimizer", "state", 3), "The checkpoint's optimizer has no moments"),
        (("optimizer", "state", 9, {}), "has moments of no parameter, 9"),
        (("optimizer", "state", 0, None), r"has no moment 0 step of shape \(\)"),
        (("optimizer", "state", 0, "step", torch.tensor(0.0)), "moment 0 step holds numbers that it cannot have"),
        (("optimizer", "state", 1, "exp_avg_sq", "none"), "has no moment 1 exp_avg_sq"),
        (("optimizer", "state", 0, "exp_avg_sq", -torch.ones(64, 32)), "moment 0 exp_avg_sq holds numbers"),
        (("optimizer", "param_groups", None), "has no groups of parameters"),
        (("optimizer", "param_groups", 0, "betas", (2.0, 0.9)), "0.betas is"),
        (("average", "shadow_params", 3), "has no average 0 of shape"),
        (("average", "shadow_params", 1, torch.full((32,), torch.nan)), "average|has no average 1"),
        (("average", "decay", 2.0), "average.decay is 2.0 in the checkpoint and 0.9 here"),
        (("average", "optimization_step", "x"), "average.optimization_step is a str"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change, sentence):
    trainer, data = trainer_for(TopKSAE(32, 64, 3), steps=40, ema=0.9)
    trainer.step(data[:64])
    other, _ = trainer_for(TopKSAE(32, 64, 3), steps=40, ema=0.9)
    before = describe(other.state_dict())
    with pytest.raises(InputError, match=sentence):
        other.load_state_dict(damaged(copy.deepcopy(trainer.state_dict()), change))
    assert describe(other.state_dict()) == before


def state_of(trainer):
    return copy.deepcopy(trainer.state_dict())


def assert_same_state(trainer, before):
    for a, b in zip(tree_leaves(trainer.state_dict()), tree_leaves(before), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_loss_that_is_not_finite_stops_the_training():
    trainer, data = trainer_for(TopKSAE(32, 64, 3))
    with torch.no_grad():
        trainer.sae.W_dec.mul_(1e30)
    before = state_of(trainer)
    with pytest.raises(FloatingPointError, match="at step 0; lower the rate"):
        trainer.step(data[:10])
    assert_same_state(trainer, before)


CONSTANT = torch.full((64, 32), 0.1)  # whose mean is not exactly 0.1
BAD_ROWS = {
    "NaN": (lambda x: x * float("nan"), "hold numbers that are not finite"),
    "infinite": (lambda x: x.index_fill(1, torch.tensor([3]), torch.inf), "hold numbers that are not finite"),
    "constant": (lambda x: CONSTANT, "are all the same"),
    "zero": (lambda x: torch.zeros_like(x), "are all the same"),
    "single": (lambda x: x[:1], "are all the same"),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_that_have_no_fvu_are_refused(bad, kind):
    """As a sample and in a step, which changes nothing."""
    make, message = BAD_ROWS[bad]
    trainer, data = trainer_for(of_kind(*kind, d_in=32, n_latents=64))
    trainer.step(data[:64])
    before = state_of(trainer)
    with pytest.raises(InputError, match=f"rows of step 1 {message}"):
        trainer.step(make(data[:64]))
    assert_same_state(trainer, before)
    with pytest.raises(InputError, match=message.split(" ", 1)[1]):
        SAETrainer(TopKSAE(32, 64, 3), TrainingConfig(10), make(data[:64]))


def test_weights_that_weigh_nothing_are_refused():
    trainer, data = trainer_for(TopKSAE(32, 64, 3))
    for weights in (torch.zeros(64), torch.full((64,), torch.nan)):
        with pytest.raises(InputError, match="The weights of step 0 add up to"):
            trainer.step(data[:64], weights)


def test_samples_and_saes_that_do_not_fit_are_refused():
    _, data = sparse_data(64)
    for sample in (data[:0], data[0], torch.randn(64, 31)):
        with pytest.raises(InputError, match=r"pass rows \(N, 32\), with N above 0"):
            SAETrainer(TopKSAE(32, 64, 3), TrainingConfig(10), sample)
    with pytest.raises(InputError, match="A Directions cannot be trained"):
        SAETrainer(Directions(32, 4), TrainingConfig(10), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rows_in_half_precision_train_as_their_fp32_copies(kind, dtype):
    """Their squares overflow float16, and an FVU of inf / inf or x / inf would be reported."""
    rows = (sparse_data(512)[0] * 60).to(dtype)
    assert (rows - rows.mean(0)).square().sum().half().isinf()

    def train(cast):
        torch.manual_seed(0)
        config = TrainingConfig(8, 128, lr=4e-3, precision="float32", dead_after=128)
        trainer = SAETrainer(of_kind(*kind, d_in=32, n_latents=64).train(), config, cast(rows))
        weights = cast(torch.linspace(0.5, 2, 128, dtype=dtype))
        figures = [trainer.step(cast(rows[i * 64 : i * 64 + 128]), weights) for i in range(7)]
        return figures, trainer.finish()

    half, full = train(lambda x: x), train(lambda x: x.float())
    assert half[0] == full[0] and half[0][-1]["fvu"] > 0.01
    for a, b in zip(half[1].state_dict().values(), full[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saes_in_half_precision_are_trained_in_fp32_and_keep_their_dtype(kind, dtype):
    rows = sparse_data(512)[0]

    def train(sae):
        config = TrainingConfig(6, 128, lr=4e-3, precision="float32", ema=0.9)
        trainer = SAETrainer(sae.train(), config, rows)
        figures = [trainer.step(rows[i * 64 : i * 64 + 128]) for i in range(6)]
        return figures, trainer.finish()

    torch.manual_seed(0)
    half = of_kind(*kind, d_in=32, n_latents=64).to(dtype)
    full = copy.deepcopy(half).float()
    (half_figures, half), (full_figures, full) = train(half), train(full)
    assert half_figures == full_figures
    for a, b in zip(half.state_dict().values(), full.state_dict().values(), strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))


def test_auxk_acts_in_short_runs(caplog):
    """By default a latent is dead after a tenth of the run's rows at most; if AuxK cannot act, the log says so."""

    def aux_of(**config):
        torch.manual_seed(0)
        sae = TopKSAE(32, 64, 3)
        sae.b_enc.data[32:] = -9.0  # half of them are negative on every row
        data, _ = sparse_data(4096)
        trainer = SAETrainer(sae, TrainingConfig(20, 128, **config), data)
        return [trainer.step(data[i * 128 : i * 128 + 128])["aux"] for i in range(20)], trainer.config.dead_after

    aux, dead_after = aux_of()
    assert dead_after == 20 * 128 // 10 and aux[1] == 0 and min(aux[2:]) > 0
    assert "AuxK" not in caplog.text
    aux, _ = aux_of(dead_after=19 * 128 + 1)
    assert max(aux) == 0 and "AuxK will not act: dead_after=2433 rows" in caplog.text
    caplog.clear()
    aux, _ = aux_of(dead_after=19 * 128)
    assert aux[-1] > 0 and "AuxK" not in caplog.text
    aux_of(dead_after=10**6, aux_weight=0.0)
    assert "AuxK" not in caplog.text
    assert TrainingConfig(10**6).resolve("cpu").dead_after == 100_000


def test_average_weights_are_those_of_the_steps(tmp_path):
    torch.manual_seed(0)
    sae = TopKSAE(32, 64, 3)
    trainer, data = trainer_for(sae, steps=60, ema=0.9)
    seen = []
    for i in range(60):
        if i == 30:  # and a checkpoint keeps them
            write_checkpoint(tmp_path / "checkpoint.pt", trainer.state_dict())
            trainer, _ = trainer_for(TopKSAE(32, 64, 3), steps=60, ema=0.9)
            trainer.load_state_dict(read_checkpoint(tmp_path / "checkpoint.pt"))
        trainer.step(data[i * 64 : (i + 1) * 64])
        seen.append(trainer.sae.b_enc.detach().clone())
    expected = seen[0]
    for i, weights in enumerate(seen[1:], 1):
        decay = min(0.9, 1 - 1 / (1 + i) ** (2 / 3))
        expected = decay * expected + (1 - decay) * weights
    scale = trainer.scale
    found = trainer.finish()
    torch.testing.assert_close(found.b_enc * scale, expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found.b_enc * scale, seen[-1], rtol=1e-3)
    torch.testing.assert_close(found.W_dec.norm(dim=-1), torch.ones(64))


def test_resampled_latents_point_where_the_loss_is():
    torch.manual_seed(0)
    sae = TopKSAE(32, 64, 3)
    sae.b_enc.data[32:] = -9.0  # half of them are negative on every row
    trainer, data = trainer_for(sae, steps=20, aux_weight=0.0, dead_after=500, resample_every=8, lr=1e-9)
    for i in range(7):
        trainer.step(data[i * 128 : (i + 1) * 128])
    silent = trainer.rows_since_fired >= 500 - 128
    before = [sae.W_dec.clone(), sae.W_enc.clone()]
    rows = data[:128] * 1.0
    rows[5] += 400 * torch.randn(32)  # by far the worst of the batch
    trainer.step(rows)
    dead = (sae.W_dec - before[0]).abs().amax(-1) > 1e-4  # all but those that fire on such a row
    assert 28 <= dead.sum() <= silent.sum() and not (dead & ~silent).any()
    directions = torch.nn.functional.normalize(rows * trainer.scale - sae.b_dec.detach(), dim=-1)
    cosine, chosen = (sae.W_dec.detach()[dead] @ directions.T).max(1)
    torch.testing.assert_close(cosine, torch.ones(int(dead.sum())))
    assert 5 in chosen and len(set(chosen.tolist())) == dead.sum()
    live = before[1][~dead].norm(dim=-1).mean()
    torch.testing.assert_close(sae.W_enc[dead], 0.2 * live * sae.W_dec[dead], atol=1e-4, rtol=0)
    torch.testing.assert_close(sae.W_dec[~dead], before[0][~dead])
    assert sae.b_enc[dead].abs().max() == 0 and trainer.rows_since_fired[dead].max() == 0
    moments = trainer.optimizer.state[sae.W_enc]["exp_avg"]
    assert moments[dead].abs().max() == 0 and moments[~dead].abs().max() > 0


def test_resampling_revives_what_would_stay_dead():
    def dead_share(every):
        torch.manual_seed(0)
        sae = TopKSAE(32, 64, 3)
        sae.b_enc.data[32:] = -9.0
        trainer, data = trainer_for(sae, steps=600, aux_weight=0.0, lr=4e-3, resample_every=every)
        for _ in range(600):
            trainer.step(data[torch.randint(0, 4096, (256,))])
        return (trainer.finish().encode(data) > 0).any(0).logical_not().float().mean().item()

    assert dead_share(None) == 0.5 and dead_share(50) < 0.4  # of 64 latents for 48 features


def test_saes_of_normalized_rows_are_not_trained():
    with pytest.raises(InputError, match="SAEs with input_norm='layer_norm' are read, not trained"):
        SAETrainer(TopKSAE(8, 32, 4, input_norm="layer_norm"), TrainingConfig(steps=1), torch.randn(50, 8))


def test_latents_below_zero_fire_too():
    sae = TopKSAE(8, 8, 8, relu=False)
    x = torch.randn(50, 8)
    assert (sae.encode(x) < 0).any()
    assert objective(sae, x[:1], torch.ones(1), 1.0, 0.1).fired.all()
