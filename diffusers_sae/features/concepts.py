"""Which latents belong to a concept, timestep by timestep, and the edits that follow from it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from ..saes import SparseAutoencoder
from ..site_mapping import SiteMapping
from ..sites import Site
from ..strengths import StrengthMap, StrengthTable
from .packing import pack, unpack
from .trained_sites import by_trained_site, check_grids

FILE = "concepts.safetensors"
SCORES = ("activity", "places", "effect")
OLD_UNIT = "effect_unit"
"""What earlier versions divided the effects of a concept by."""


@torch.no_grad()
def concept_activity(
    pipe: Any,
    saes: Mapping[Site | str, SparseAutoencoder],
    labelled: Sequence[tuple[str, Sequence[str]]],
    groups: Mapping[str, str],
    *,
    branch: str = "cond",
    batch_size: int = 16,
    seed: int = 0,
    **call: Any,
) -> SiteMapping[ConceptScores]:
    """Mean activity of every latent on every concept at every timestep, for all sites in one pass.

    The plan rests meanwhile: scores are of the unsteered model.

    Args:
        saes: `{site: SAE}`; of a path alone, kind and stream are those that the SAE was trained at, if it says so.
        labelled: prompts, each with the concepts that its image shows.
        groups: `{concept: what it is a value of}`.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...).

    Raises:
        InputError: a concept that no prompt shows, a site whose rows are no places of an image, or codes that are not
            finite.
    """
    names = tuple(groups)
    member = torch.tensor([[float(name in concepts) for name in names] for _, concepts in labelled])  # (images, C)
    counts = member.reshape(-1, len(names)).sum(0)
    unseen = [name for name, count in zip(names, counts.tolist(), strict=True) if count == 0]
    if unseen:
        raise InputError(f"No prompt shows {', '.join(unseen)}; add some, or leave those concepts out.")
    at = by_trained_site(saes)
    check_grids(at)
    tallies = {site: _Tally() for site in at}
    stream = stream_activations(
        pipe, list(at), [prompt for prompt, _ in labelled], batch_size=batch_size, seed=seed, **call
    )
    for batch in tqdm(stream, total=-(-len(labelled) // batch_size), desc="concepts", mininterval=5):
        shown = member[batch.first_image : batch.first_image + len(batch.prompts)]
        for site, sae in at.items():
            rows, timesteps = batch.rows(site, branch)
            tallies[site].add(sae, rows, shown)
            tallies[site].grid = batch.sites[site].grid
    return SiteMapping((site, tally.scores(groups, timesteps, counts)) for site, tally in tallies.items())


class _Tally:
    """Sums of the codes of one site over images, by concept."""

    def __init__(self) -> None:
        self.grid = (1, 1)
        self._signed = False
        self._steps: torch.Tensor | float = 0.0  # (C, T, n)
        self._places: torch.Tensor | float = 0.0  # (C, P, n)

    def add(self, sae: SparseAutoencoder, rows: torch.Tensor, member: torch.Tensor) -> None:
        """Count rows `(T, images, P, d)` of images that show the concepts of `member (images, C)`."""
        at_places, means = torch.zeros(()), []
        for step in rows:
            code = sae.encode(step.to(sae.W_dec.device)).float().cpu()  # (images, P, n)
            self._signed |= bool((code < 0).any())
            at_places = at_places + code
            means.append(code.mean(1))
        self._steps = self._steps + torch.einsum("ic,tin->ctn", member, torch.stack(means))
        self._places = self._places + torch.einsum("ic,ipn->cpn", member, at_places)

    def scores(self, groups: Mapping[str, str], timesteps: torch.Tensor, counts: torch.Tensor) -> ConceptScores:
        """The scores, from how many images show each concept, `(C,)`."""
        activity, places = self._steps / counts[:, None, None], torch.as_tensor(self._places)
        if self._signed:
            by_place = places / counts[:, None, None] / len(timesteps)
            shape = by_place - by_place.mean(1, keepdim=True)
        else:
            mean = places.mean(1, keepdim=True)
            shape = torch.where(mean > 0, places / mean, 0.0)
        kinds = tuple(groups.values())
        return ConceptScores(tuple(groups), kinds, timesteps.cpu(), activity, shape, self.grid, signed=self._signed)


@dataclass
class ConceptScores:
    """Scores of every latent for every concept at every timestep.

    Args:
        concepts: names, such as `neon`.
        groups: what each is a value of, such as `style`; a concept is told apart from the others of its group.
        timesteps: `(T,)`, from noise to image.
        activity: `(C, T, n)`, mean activation on images of the concept, over places and images.
        places: `(C, P, n)`, mean activation at each place, over images and timesteps, in multiples of the
            mean place; 0 for a latent that is active at none. Of signed codes, whose mean may be 0: minus the mean
            place, in raw activation.
        grid: height and width of the P places.
        effect: `(C, T, n)`, how far the latents' activity moves the denoiser towards the concept, where measured.
        signed: whether latents may be below 0, as those of `Directions` and of a TopK SAE without ReLU.

    Raises:
        InputError: shapes that do not fit each other, or numbers that are not finite.
    """

    concepts: tuple[str, ...]
    groups: tuple[str, ...]
    timesteps: torch.Tensor
    activity: torch.Tensor
    places: torch.Tensor
    grid: tuple[int, int]
    effect: torch.Tensor | None = None
    signed: bool = False

    def __post_init__(self) -> None:
        self._check_labels()
        c, t, n = len(self.concepts), len(self.timesteps), self.activity.shape[-1]
        expected = {"activity": (c, t, n), "places": (c, self.grid[0] * self.grid[1], n), "effect": (c, t, n)}
        for name, shape in expected.items():
            scores = getattr(self, name)
            if scores is None:
                continue
            if tuple(scores.shape) != shape:
                raise InputError(f"The {name} of the concepts has the shape {tuple(scores.shape)}, and not {shape}.")
            if not torch.isfinite(scores).all():
                raise InputError(
                    f"The {name} of the concepts has numbers that are not finite; "
                    "see whether the pipeline runs in this dtype without overflow, and compute it again."
                )

    def _check_labels(self) -> None:
        """Raise `InputError` unless names, grid and timesteps can label the axes of the scores."""
        names = (*self.concepts, *self.groups)
        if not all(isinstance(name, str) for name in names) or len(set(self.concepts)) < len(self.concepts):
            raise InputError(f"The concepts are {self.concepts} in the groups {self.groups}; pass distinct names.")
        if not self.concepts or len(self.groups) != len(self.concepts):
            raise InputError(f"{len(self.concepts)} concepts have {len(self.groups)} groups; pass a group for each.")
        if len(self.grid) != 2 or not all(type(side) is int and side > 0 for side in self.grid):
            raise InputError(f"The grid of the concepts is {self.grid}; pass its height and width, such as (16, 16).")
        steps = self.timesteps
        if steps.ndim != 1 or not len(steps) or not steps.float().isfinite().all():
            raise InputError(f"The timesteps of the concepts have shape {tuple(steps.shape)}; pass finite ones, (T,).")
        if len(steps.unique()) != len(steps):
            raise InputError("The timesteps of the concepts hold one twice; pass distinct ones.")

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

    def rivals(self, concept: str) -> list[int]:
        """`others`; raises `InputError` if there are none."""
        others = self.others(concept)
        if not others:
            raise InputError(
                f"{concept!r} is the only {self.groups[self.index(concept)]!r}, so that nothing tells it apart; "
                "score another one of its group as well."
            )
        return others

    def importance(self, concept: str) -> torch.Tensor:
        """Share of a latent's activity on the concept minus its share on all others, `(T, n)`.

        A share is the latent's part of all activity at that timestep (SAeuron, 2501.18052); of signed codes, of their
        magnitude, and the difference counts in the direction in which the concept moves the latent.
        """
        total = self.activity.abs().sum(-1, keepdim=True)
        share = torch.where(total > 0, self.activity / total, 0.0)  # (C, T, n)
        own = share[self.index(concept)]
        return torch.where(own < 0, -1.0, 1.0) * (own - share[self.rivals(concept)].mean(0))

    def measured_effect(self, concept: str) -> torch.Tensor:
        """What the latents' activity does towards this concept beyond what it does towards the others, `(T, n)`."""
        if self.effect is None:
            raise InputError("No effects lie beside this SAE; measure them, or choose by='activity'.")
        return self.effect[self.index(concept)] - self.effect[self.rivals(concept)].mean(0)

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

        Raises:
            InputError: no such concept, nothing to compare it with, or no latent that differs.
        """
        rivals = self.rivals(concept) if instead_of is None else [self.index(instead_of)]
        difference = self.activity_by_place(concept)  # (T, P, n)
        for rival in rivals:
            difference -= self.activity_by_place(self.concepts[rival]) / len(rivals)
        chosen = _top(difference.abs().mean(1), percentile)
        if not chosen.any():
            what = ", ".join(self.concepts[rival] for rival in rivals)
            raise InputError(f"No latent differs between images of {concept!r} and of {what}; name other concepts.")
        strengths = strength * difference * chosen[:, None]
        steps = tuple(self.timesteps.tolist())
        features = chosen.any(0).nonzero().flatten().tolist()
        return {j: StrengthMap(steps, strengths[..., j].unflatten(1, self.grid).contiguous()) for j in features}

    def activity_by_place(self, concept: str) -> torch.Tensor:
        """Mean activation on images of the concept, `(T, P, n)`: timestep times place, or plus it for signed codes."""
        c = self.index(concept)
        return self.activity[c][:, None] + self.places[c] if self.signed else self.activity[c][:, None] * self.places[c]

    def away(
        self, concept: str, strength: float = -1.0, percentile: float = 99.0, by: str = "activity"
    ) -> dict[int, StrengthTable]:
        """Factors for `steer(..., mode="scale")` that remove the concept: `strength` for the latents of `choose`.

        0 takes the latents out, a negative factor turns them round (SAeuron's gamma).

        Raises:
            InputError: no such concept or way, nothing to compare it with, or no latent that is chosen.
        """
        chosen = self.choose(concept, percentile, by)
        if not chosen.any():
            raise InputError(f"No latent is more of {concept!r} than of the others of its group; score more images.")
        return self.tables(chosen, torch.full(chosen.shape, float(strength)), otherwise=1.0)

    def tables(self, chosen: torch.Tensor, values: torch.Tensor, otherwise: float) -> dict[int, StrengthTable]:
        """`{feature: StrengthTable}` with `values (T, n)` where `chosen (T, n)` and `otherwise` elsewhere."""
        steps = tuple(self.timesteps.tolist())
        filled = torch.where(chosen, values, torch.tensor(otherwise))
        features = chosen.any(0).nonzero().flatten().tolist()
        return {j: StrengthTable(steps, tuple(filled[:, j].tolist())) for j in features}

    def save(self, folder: Path) -> None:
        """Write `concepts.safetensors` into an SAE's folder, each score to 11 bits (see `packing`).

        Raises:
            InputError: a score is not finite. Nothing is written.
        """
        self.__post_init__()
        tensors = {"timesteps": self.timesteps}
        for name in SCORES:
            if getattr(self, name) is not None:
                tensors |= pack(name, getattr(self, name))
        names = {key: json.dumps(getattr(self, key)) for key in ("concepts", "groups", "grid", "n_latents", "signed")}
        whole = {k: v.contiguous() for k, v in tensors.items()}
        write_whole(folder / FILE, lambda partial: save_file(whole, partial, metadata=names))

    @classmethod
    def load(cls, folder: str | Path) -> ConceptScores:
        """Read what `save` wrote, in this version or an earlier one."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, "pt") as file:
                names = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
                stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            _check_not_cut(stored)
            _check_units(stored)
            scores = {
                name: unpack(name, stored, names["n_latents"])
                for name in SCORES
                if name != "effect" or f"{name}.there" in stored
            }
            if OLD_UNIT in stored:
                scores["effect"] *= stored[OLD_UNIT]
            concepts, groups, grid = (tuple(_list(names, key)) for key in ("concepts", "groups", "grid"))
            signed = names.get("signed", False)
            if not isinstance(signed, bool):
                raise InputError(f"its signed is {signed!r:.80}")
            return cls(concepts, groups, stored["timesteps"], grid=grid, signed=signed, **scores)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise InputError(
                f"{path} cannot be read as concept scores ({reason}); compute or fetch them again."
            ) from None


def _list(names: Mapping[str, Any], key: str) -> list[Any]:
    if not isinstance(names[key], list):
        raise InputError(f"its {key} is {names[key]!r:.80} and no list")
    return names[key]


def _check_not_cut(stored: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` for a file whose float8 could not hold the values: the type ends at 448."""
    values = stored["places.values"]
    if values.dtype == torch.float8_e4m3fn and bool((values.float() >= 448).any()):
        raise InputError("an earlier version cut its places at 448 times their mean")


def _check_units(stored: Mapping[str, torch.Tensor]) -> None:
    """Raise `InputError` where a unit is missing: all scores have one, or in earlier versions the effect alone."""
    have = {name: f"{name}.unit" in stored for name in SCORES if f"{name}.there" in stored}
    if any(have.values()):
        missing = [f"{name}.unit" for name, has in have.items() if not has]
    else:
        missing = [OLD_UNIT] if "effect" in have and OLD_UNIT not in stored else []
    if missing:
        raise InputError(f"it holds no {', '.join(missing)}")


def _top(score: torch.Tensor, percentile: float) -> torch.Tensor:
    """Which of the scores `(T, n)` lie at or above the percentile of their row, and above 0."""
    if not 0 <= percentile < 100:
        raise InputError(f"percentile={percentile} must be at least 0 and below 100, such as 99.")
    bounds = torch.stack([row.quantile(percentile / 100) for row in score])  # at once, its size is limited
    return (score >= bounds[:, None]) & (score > 0)
