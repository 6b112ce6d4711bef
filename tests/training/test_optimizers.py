"""What optimisers keep, and what a training step holds at a time."""

import pytest
import torch
from kinds import KINDS, of_kind
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_sae import InputError
from diffusers_sae.saes import ops
from diffusers_sae.training import SAETrainer, TrainingConfig
from diffusers_sae.training.losses import aux_k_loss
from diffusers_sae.training.objectives import objective

D, LATENTS, ROWS = 16, 1024, 256
CHOSEN = [kind for kind in KINDS if kind[1].get("k")]


class Held(TorchDispatchMode):
    """Watches what is made beside `parameters`: the most storages of a matrix's size at a time, and how many numbers
    the largest tensor of another shape has."""

    def __init__(self, parameters):
        super().__init__()
        self._own = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._alive, self.most, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage.nbytes() >= 4 * D * LATENTS and storage._cdata not in self._own:
                    self._alive[storage._cdata] = StorageWeakRef(storage)
                if tuple(tensor.shape) != (LATENTS, D):
                    self.largest = max(self.largest, storage.nbytes() // tensor.element_size())
        self._alive = {key: each for key, each in self._alive.items() if not each.expired()}
        self.most = max(self.most, len(self._alive))
        return found


def step_of(kind, optimizer):
    """What a step with AuxK held."""
    torch.manual_seed(0)
    sae, rows = of_kind(*kind, d_in=D, n_latents=LATENTS), torch.randn(ROWS, D)
    trainer = SAETrainer(sae.train(), TrainingConfig(10, ROWS, k_aux=8, dead_after=ROWS, optimizer=optimizer), rows)
    trainer.step(rows)
    with Held(sae.parameters()) as held:
        figures = trainer.step(rows)
    assert figures["aux"] > 0 and figures["dead"] > 0.1
    return held, trainer


@pytest.mark.parametrize("kind", CHOSEN, ids=str)
def test_no_more_pre_activations_are_held_than_the_bound(monkeypatch, kind):
    whole, _ = step_of(kind, "adafactor")
    assert whole.largest == ROWS * LATENTS
    monkeypatch.setattr(ops, "HELD", 2**14)
    assert step_of(kind, "adafactor")[0].largest <= 2**14 + D * LATENTS // 2  # and halves of the weights: Matryoshka's


@pytest.mark.parametrize("bound", [1, 3000, 2**14])
@pytest.mark.parametrize("kind", CHOSEN, ids=str)
def test_the_bound_changes_no_code(monkeypatch, kind, bound):
    torch.manual_seed(0)
    sae, x = of_kind(*kind, d_in=D, n_latents=LATENTS).double(), torch.randn(ROWS, D).double()
    dead = torch.arange(LATENTS) % 3 == 0

    def gradients():
        found = objective(sae, x, None, 1.0, 0.1)
        aux = aux_k_loss(sae, x, found.x_hat, dead, 7)
        sae.zero_grad()
        (found.loss + aux).backward()
        return [found.loss, aux, found.fired, *(p.grad.clone() for p in sae.parameters())]

    expected = gradients()
    monkeypatch.setattr(ops, "HELD", bound)
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_adafactor_keeps_next_to_nothing_and_makes_one_update_at_a_time(monkeypatch):
    monkeypatch.setattr(ops, "HELD", 2**12)
    held, kept = {}, {}
    for optimizer in ("adam", "adafactor"):
        held[optimizer], trainer = step_of(("TopKSAE", {"k": 4}), optimizer)
        state = trainer.optimizer.state_dict()["state"].values()
        parameters = sum(parameter.numel() for parameter in trainer.sae.parameters())
        kept[optimizer] = sum(moment.numel() for each in state for moment in each.values()) / parameters
        torch.testing.assert_close(trainer.sae.W_dec.norm(dim=-1), torch.ones(LATENTS))
    assert kept["adam"] > 2 and kept["adafactor"] < 0.15  # 1/d and 1/n of a matrix, and the biases
    # both gradients, what AuxK adds to one, and their sum, which is taken in place where nobody watches
    assert held["adafactor"].most <= 4
    objective(trainer.sae, torch.randn(ROWS, D), None, 1.0, 0.1).loss.backward()
    with Held(trainer.sae.parameters()) as update:
        trainer.optimizer.step()
    assert update.most == 1


def test_adafactor_forgets_latents_that_are_resampled():
    torch.manual_seed(0)
    sae, rows = of_kind("TopKSAE", {"k": 4}, d_in=D, n_latents=64), torch.randn(ROWS, D)
    sae.b_enc.data[32:] = -99.0
    config = TrainingConfig(8, ROWS, aux_weight=0.0, dead_after=ROWS, resample_every=3, optimizer="adafactor", lr=1e-5)
    trainer = SAETrainer(sae.train(), config, rows)
    for _ in range(3):
        trainer.step(rows)
    for parameter, name in ((sae.W_enc, "row_var"), (sae.b_enc, "variance")):
        moment = trainer.optimizer.state[parameter][name]
        assert len(moment[32:].unique()) == 1 and moment[:32].min() < moment[32:].max() < moment[:32].max()
    assert trainer.optimizer.state[sae.W_enc]["col_var"].unique().numel() > 1


@pytest.mark.parametrize("kind", [*KINDS, ("ChannelAwareSAE", {"channels": 8})], ids=str)
def test_pre_activations_at_places_are_those_of_all(kind):
    sae, x = of_kind(*kind, n_latents=32), torch.randn(16, 8)
    indices = torch.rand(16, 32).topk(5).indices
    torch.testing.assert_close(sae.pre_activations_at(x, indices), sae.pre_activations(x).gather(1, indices))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(InputError, match="'sgd' is not an optimizer; choose from adam, adafactor"):
        TrainingConfig(1, optimizer="sgd")
