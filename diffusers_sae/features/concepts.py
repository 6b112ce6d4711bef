"""Which latents belong to a concept, timestep by timestep, and the edits that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ..capture import stream_activations
from ..errors import InputError
from ..saes import SparseAutoencoder
from ..strengths import StrengthMap, StrengthTable

FILE = "concepts.safetensors"


@torch.no_grad()
def concept_activity(
    pipe: Any,
    saes: Mapping[str, SparseAutoencoder],
    labelled: Sequence[tuple[str, Sequence[str]]],
    groups: Mapping[str, str],
    *,
    branch: str = "cond",
    batch_size: int = 16,
    seed: int = 0,
    **call: Any,
) -> dict[str, ConceptScores]:
    """Mean activity of every latent on every concept at every timestep, for all sites in one pass.

    Args:
        saes: `{site: SAE}`.
        labelled: prompts, each with the concepts that its image shows.
        groups: `{concept: what it is a value of}`.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...).
    """
    names = tuple(groups)
    sums: dict[str, torch.Tensor] = {}
    places: dict[str, torch.Tensor] = {}
    grids: dict[str, tuple[int, int]] = {}
    counts = torch.zeros(len(names), 1, 1)
    stream = stream_activations(
        pipe, list(saes), [prompt for prompt, _ in labelled], batch_size=batch_size, seed=seed, **call
    )
    for batch in tqdm(stream, total=-(-len(labelled) // batch_size), desc="concepts", mininterval=5):
        shown = labelled[batch.first_image : batch.first_image + len(batch.prompts)]
        member = torch.tensor([[float(name in concepts) for name in names] for _, concepts in shown])  # (images, C)
        counts += member.sum(0)[:, None, None]
        for site, sae in saes.items():
            rows, timesteps = batch.rows(site, branch)
            grids[site] = batch.sites[site].grid
            at_places = torch.zeros(*rows.shape[1:3], sae.n_latents)  # (images, P, n)
            means = []
            for step in rows:
                code = sae.encode(step)
                at_places += code
                means.append(code.mean(1))
            sums[site] = sums.get(site, 0) + torch.einsum("ic,tin->ctn", member, torch.stack(means))
            places[site] = places.get(site, 0) + torch.einsum("ic,ipn->cpn", member, at_places)
    unseen = [name for name, count in zip(names, counts.flatten().tolist(), strict=True) if count == 0]
    if unseen:
        raise InputError(f"No prompt shows {', '.join(unseen)}; add some, or leave those concepts out.")
    kinds = tuple(groups.values())
    return {
        site: ConceptScores(names, kinds, timesteps, total / counts, _relative(places[site]), grids[site])
        for site, total in sums.items()
    }


def _relative(places: torch.Tensor) -> torch.Tensor:
    """Sums by place `(C, P, n)` in multiples of their mean over places; 0 for a latent that is active at none."""
    return places / places.mean(1, keepdim=True).clamp(min=1e-12)


@dataclass
class ConceptScores:
    """Scores of every latent for every concept at every timestep.

    Args:
        concepts: names, such as `neon`.
        groups: what each is a value of, such as `style`; a concept is told apart from the others of its group.
        timesteps: `(T,)`, from noise to image.
        activity: `(C, T, n)`, mean activation on images of the concept, over places and images.
        places: `(C, P, n)`, mean activation at each place, over images and timesteps, in multiples of the
            mean place; 0 for a latent that is active at none.
        grid: height and width of the P places.
        effect: `(C, T, n)`, how far the latents' activity moves the denoiser towards the concept, where measured.
    """

    concepts: tuple[str, ...]
    groups: tuple[str, ...]
    timesteps: torch.Tensor
    activity: torch.Tensor
    places: torch.Tensor
    grid: tuple[int, int]
    effect: torch.Tensor | None = None

    @property
    def n_latents(self) -> int:
        return self.activity.shape[-1]

    def index(self, concept: str) -> int:
        """Position of a concept; raises `InputError` for an unknown one."""
        if concept not in self.concepts:
            raise InputError(f"{concept!r} is not among the concepts; choose one of {', '.join(self.concepts)}.")
        return self.concepts.index(concept)

    def others(self, concept: str) -> list[int]:
        """The other concepts of its group."""
        c = self.index(concept)
        return [i for i, group in enumerate(self.groups) if group == self.groups[c] and i != c]

    def importance(self, concept: str) -> torch.Tensor:
        """Share of a latent's activity on the concept minus its share on all others, `(T, n)`.

        A share is the latent's part of all activity at that timestep (SAeuron, 2501.18052).
        """
        share = self.activity / self.activity.sum(-1, keepdim=True).clamp(min=1e-12)  # (C, T, n)
        return share[self.index(concept)] - share[self.others(concept)].mean(0)

    def measured_effect(self, concept: str) -> torch.Tensor:
        """What the latents' activity does towards this concept beyond what it does towards the others, `(T, n)`."""
        if self.effect is None:
            raise InputError("No effects lie beside this SAE; measure them, or choose by='activity'.")
        return self.effect[self.index(concept)] - self.effect[self.others(concept)].mean(0)

    def choose(self, concept: str, percentile: float = 99.0, by: str = "activity") -> torch.Tensor:
        """`(T, n)` bool: latents whose score lies at or above the percentile of their timestep, and above 0."""
        if by not in ("activity", "effect"):
            raise InputError(f"by={by!r} is not a way to choose; pass 'activity' or 'effect'.")
        score = self.importance(concept) if by == "activity" else self.measured_effect(concept)
        return _top(score, percentile)

    def towards(
        self, concept: str, strength: float = 1.0, percentile: float = 95.0, instead_of: str | None = None
    ) -> dict[int, StrengthMap]:
        """Strengths for `steer(..., mode="add")` that move an image towards the concept.

        Every chosen latent is raised, or lowered, by what images of the concept have more of it at each place than
        images of the others of its group, or than those of `instead_of`; times `strength`. Chosen are the latents of
        each timestep in which they differ most.
        """
        rivals = self.others(concept) if instead_of is None else [self.index(instead_of)]
        difference = self.activity_by_place(concept)  # (T, P, n)
        for rival in rivals:
            difference -= self.activity_by_place(self.concepts[rival]) / len(rivals)
        chosen = _top(difference.abs().mean(1), percentile)
        strengths = strength * difference * chosen[:, None]
        steps = tuple(self.timesteps.tolist())
        features = chosen.any(0).nonzero().flatten().tolist()
        return {j: StrengthMap(steps, strengths[..., j].unflatten(1, self.grid).contiguous()) for j in features}

    def activity_by_place(self, concept: str) -> torch.Tensor:
        """Mean activation on images of the concept, `(T, P, n)`, as a product of timestep and place."""
        c = self.index(concept)
        return self.activity[c][:, None] * self.places[c]

    def away(
        self, concept: str, strength: float = -1.0, percentile: float = 99.0, by: str = "activity"
    ) -> dict[int, StrengthTable]:
        """Factors for `steer(..., mode="scale")` that remove the concept: `strength` for the latents of `choose`.

        0 takes the latents out, a negative factor turns them round (SAeuron's gamma).
        """
        chosen = self.choose(concept, percentile, by)
        return self.tables(chosen, torch.full(chosen.shape, float(strength)), otherwise=1.0)

    def tables(self, chosen: torch.Tensor, values: torch.Tensor, otherwise: float) -> dict[int, StrengthTable]:
        """`{feature: StrengthTable}` with `values (T, n)` where `chosen (T, n)` and `otherwise` elsewhere."""
        steps = tuple(self.timesteps.tolist())
        filled = torch.where(chosen, values, torch.tensor(otherwise))
        features = chosen.any(0).nonzero().flatten().tolist()
        return {j: StrengthTable(steps, tuple(filled[:, j].tolist())) for j in features}

    def save(self, folder: Path) -> None:
        """Write `concepts.safetensors` into an SAE's folder: where each score is not 0, and its values there."""
        tensors = {"timesteps": self.timesteps, **_packed("activity", self.activity.half())}
        tensors |= _packed("places", self.places.to(torch.float8_e4m3fn))  # of 0 to P, to 6 %
        if self.effect is not None:
            unit = self.effect.abs().amax((1, 2), keepdim=True).clamp(min=1e-12) / 448  # (C, 1, 1); the type's largest
            tensors |= _packed("effect", (self.effect / unit).to(torch.float8_e4m3fn)) | {"effect_unit": unit}
        names = {key: json.dumps(getattr(self, key)) for key in ("concepts", "groups", "grid", "n_latents")}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE, metadata=names)

    @classmethod
    def load(cls, folder: str | Path) -> ConceptScores:
        """Read what `save` wrote."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, "pt") as file:
                names = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            scores = {
                key: _unpacked(stored[f"{key}.there"], stored[f"{key}.values"], names["n_latents"])
                for key in ("activity", "places", "effect")
                if key != "effect" or "effect_unit" in stored
            }
            if "effect" in scores:
                scores["effect"] *= stored["effect_unit"]
            concepts, groups, grid = (tuple(names[key]) for key in ("concepts", "groups", "grid"))
            found = stored["timesteps"], scores["activity"], scores["places"], grid, scores.get("effect")
            return cls(concepts, groups, *found)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path} cannot be read as concept scores ({error}); compute or fetch them again."
            ) from None


def _packed(name: str, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Most scores are 0: where they are not, as bits along the last axis, and their values there."""
    there = scores.float() != 0
    return {f"{name}.there": torch.from_numpy(np.packbits(there.numpy(), axis=-1)), f"{name}.values": scores[there]}


def _unpacked(there: torch.Tensor, values: torch.Tensor, n_latents: int) -> torch.Tensor:
    found = torch.from_numpy(np.unpackbits(there.numpy(), axis=-1, count=n_latents)).bool()
    return torch.zeros(found.shape).masked_scatter_(found, values.float())


def _top(score: torch.Tensor, percentile: float) -> torch.Tensor:
    """Which of the scores `(T, n)` lie at or above the percentile of their row, and above 0."""
    if not 0 <= percentile < 100:
        raise InputError(f"percentile={percentile} must be at least 0 and below 100, such as 99.")
    return (score >= score.quantile(percentile / 100, dim=-1, keepdim=True)) & (score > 0)
