"""Detectors: linear readings of an SAE's code that tell which concepts a prompt asks for, at the first step already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..capture import stream_activations
from ..disk import write_whole
from ..errors import InputError
from ..rules import Rule
from ..saes import SparseAutoencoder
from ..site_mapping import SiteMapping
from ..sites import Site
from .bounds import midway
from .trained_sites import by_trained_site

FILE = "detectors.safetensors"
HELD_OUT = 0.25
RIDGE = 0.01
RAREST = 0.01
CONSTANT = 1e-6
"""Spread of a latent, in parts of its largest magnitude, up to which prompts differ by rounding alone."""


@dataclass
class ConceptDetectors:
    """For every concept a direction in the mean code of an image and a bound above which the concept is asked for.

    Args:
        concepts: names.
        weights: `(C, n)`, in units of 1 / raw activation.
        bounds: `(C,)`.
        accuracy: `(C,)`, balanced accuracy on the prompts by which the bounds were chosen.
    """

    concepts: tuple[str, ...]
    weights: torch.Tensor
    bounds: torch.Tensor
    accuracy: torch.Tensor

    def rule(self, concept: str, adapter_name: str | None = None) -> Rule:
        """For `steer(..., when=...)`: act on images of prompts that ask for the concept."""
        if concept not in self.concepts:
            raise InputError(f"{concept!r} has no detector; choose one of {', '.join(self.concepts)}.")
        c = self.concepts.index(concept)
        used = self.weights[c].nonzero().flatten().tolist()
        if not used:
            raise InputError(f"The detector of {concept!r} reads no latent, as none differed; use another SAE or site.")
        weights = self.weights[c, used].tolist()
        return Rule(dict(zip(used, weights, strict=True)), self.bounds[c].item(), adapter_name)

    def save(self, folder: Path) -> None:
        """Write `detectors.safetensors` into an SAE's folder."""
        tensors = {key: getattr(self, key).contiguous() for key in ("weights", "bounds", "accuracy")}
        metadata = {"concepts": json.dumps(self.concepts)}
        write_whole(folder / FILE, lambda partial: save_file(tensors, partial, metadata=metadata))

    @classmethod
    def load(cls, folder: str | Path) -> ConceptDetectors:
        """Read what `save` wrote."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, "pt") as file:
                concepts = json.loads(file.metadata()["concepts"])
                weights, bounds, accuracy = (file.get_tensor(key) for key in ("weights", "bounds", "accuracy"))
            _check_stored(concepts, weights, bounds, accuracy)
            return cls(tuple(concepts), weights, bounds, accuracy)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                f"{path} cannot be read as concept detectors ({reason}); compute or fetch them again."
            ) from None


def _check_stored(concepts: Any, weights: torch.Tensor, bounds: torch.Tensor, accuracy: torch.Tensor) -> None:
    """Raise `InputError` unless these are detectors of concepts by distinct names."""
    if not isinstance(concepts, list) or not all(isinstance(name, str) for name in concepts):
        raise InputError(f"its concepts are {concepts!r:.80} and no names")
    if len(set(concepts)) < len(concepts) or weights.ndim != 2 or not weights.shape[1]:
        raise InputError("a concept is there twice, or a detector without weights")
    if not len(concepts) == len(weights) == len(bounds) == len(accuracy) or not bounds.ndim == accuracy.ndim == 1:
        raise InputError("it has not as many weights, bounds and accuracies as concepts")
    if not weights.float().isfinite().all() or bounds.float().isnan().any() or accuracy.float().isnan().any():
        raise InputError("it has numbers that are not finite")


@torch.no_grad()
def concept_detectors(
    pipe: Any,
    saes: Mapping[Site | str, SparseAutoencoder],
    labelled: Sequence[tuple[str, Sequence[str]]],
    concepts: Iterable[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
    **call: Any,
) -> SiteMapping[ConceptDetectors]:
    """Detectors for `{site: SAE}` from the first denoising step of labelled prompts; no image is finished for them.

    A concept's direction is the ridge regression of its label on the standardised mean code, fitted on three quarters
    of the prompts (for two classes this is Fisher's discriminant). Its bound is where balanced accuracy is highest on
    the rest. Latents that are the same for all prompts are not read. The plan rests meanwhile.

    Args:
        saes: of a path alone, kind, stream and layout are those that the SAE was trained at, if it says so.
        labelled: prompts, each with the concepts that it names.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...).

    Raises:
        InputError: a concept that no prompt, or every prompt, of either part names, or codes that are not finite.
    """
    names = tuple(concepts)
    labels = torch.tensor([[name in named for name in names] for _, named in labelled]).reshape(
        -1, len(names)
    )  # (N, C)
    fitted = int((1 - HELD_OUT) * len(labelled))
    parts = (labels[:fitted], labels[fitted:])
    for few, wanted in (("name", True), ("do without", False)):
        unseen = [name for c, name in enumerate(names) if not all((part[:, c] == wanted).any() for part in parts)]
        if unseen:
            raise InputError(f"Too few prompts {few} {', '.join(unseen)}; add some, or leave those concepts out.")
    at = by_trained_site(saes)
    codes: dict[Site, list[torch.Tensor]] = {site: [] for site in at}
    stream = stream_activations(
        pipe, list(at), [prompt for prompt, _ in labelled], batch_size=batch_size, seed=seed,
        first_step_only=True, **call,
    )  # fmt: skip
    for batch in tqdm(stream, total=-(-len(labelled) // batch_size), desc="detectors", mininterval=5):
        for site, sae in at.items():
            rows = batch.rows(site)[0][0].to(sae.W_dec.device)
            codes[site].append(sae.encode(rows).float().mean(1).cpu())  # (images, n)
    for site, each in codes.items():
        if not all(torch.isfinite(code).all() for code in each):
            raise InputError(f"Codes of {site} are not finite; see whether the pipeline overflows in its dtype.")
    return SiteMapping((site, _fit(torch.cat(code), labels, fitted, names)) for site, code in codes.items())


def _fit(codes: torch.Tensor, labels: torch.Tensor, fitted: int, names: tuple[str, ...]) -> ConceptDetectors:
    """Detectors from codes `(N, n)` and labels `(N, C)`, of which the first `fitted` are fitted."""
    x, y = codes[:fitted].double(), labels[:fitted].double()
    used = (x != 0).double().mean(0) >= RAREST
    spread = x.std(0)
    used &= spread > CONSTANT * x.abs().amax(0)
    spread = spread[used]
    standard = (x[:, used] - x[:, used].mean(0)) / spread
    penalty = RIDGE * fitted * torch.eye(standard.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(standard.T @ standard + penalty, standard.T @ (y - y.mean(0)))  # (used, C)
    weights = torch.zeros(len(names), codes.shape[1])
    weights[:, used] = (solution / spread[:, None]).T.float()
    scores = codes[fitted:] @ weights.T
    chosen = [_bound(scores[:, c], labels[fitted:, c]) for c in range(len(names))]
    bounds, accuracy = torch.tensor(chosen).T
    return ConceptDetectors(names, weights, bounds, accuracy)


def _bound(scores: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The bound on scores `(N,)` with the highest balanced accuracy, in the middle of its gap, and that accuracy.

    Equal scores lie on the same side of it. Where nothing is better than chance, no score lies above it.
    """
    order = scores.argsort()
    ranked, positive = scores[order], labels[order].double()
    missed = positive.cumsum(0) / positive.sum()
    rejected = (1 - positive).cumsum(0) / (1 - positive).sum()
    balanced = (1 - missed + rejected) / 2  # of a bound between i and i + 1
    balanced[:-1][ranked[1:] == ranked[:-1]] = 0.0
    best = (balanced >= balanced.max() - 1e-12).nonzero().flatten()
    i = int(best[len(best) // 2])
    bound = midway(ranked[i], ranked[i + 1]) if i + 1 < len(ranked) else float(ranked[i])
    return bound, float(balanced[i])
