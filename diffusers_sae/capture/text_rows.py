"""Rows of text encoders for a store: of each prompt, the tokens that are asked for. No image is made."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from ..sites import Site
from .places import random_places
from .text import TokenActivations, check_sites, stream_prompts_at

ENCODER_SETS = ("prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance")
"""Arguments of `encode_prompt` that are set for it."""


class TextRows(NamedTuple):
    """What a store keeps of the tokens of prompts.

    Args:
        tokens: `words`, `padded` or `all`; see `stream_prompts`.
        places: how many random tokens of each prompt; all of those by default.
        seed: of that choice.
    """

    tokens: str = "all"
    places: int | None = None
    seed: int = 0

    def stream(
        self, pipe: Any, sites: Sequence[Site], prompts: Sequence[str], batch_size: int, skip: int, encode: Mapping
    ) -> Iterator[tuple[int, int, dict[Site, dict[str, torch.Tensor]]]]:
        """For each batch of prompts from the one numbered `skip` on: the first one's number, how many they are, and
        `{site: tensors}`, where the tensors are `rows (N, d)` and the labels `(N,)` of each: `timestep` and `branch`,
        which are 0, `image`, the number of the prompt, `place`, the token's position, and `token`, its id. The plan
        rests while they are read.
        """
        first = skip
        stream = stream_prompts_at(
            pipe, sites, prompts[skip:], batch_size=batch_size, keep=self.tokens, steered=False, **encode
        )
        for read in stream:
            count = len(next(iter(read.values())).prompts)
            yield first, count, {site: self._tensors(held, first) for site, held in read.items()}
            first += count

    def _tensors(self, held: TokenActivations, first: int) -> dict[str, torch.Tensor]:
        chosen = []
        for i, kept in enumerate(held.kept):
            tokens = kept.nonzero()[:, 0]
            count = len(tokens) if self.places is None else min(self.places, len(tokens))
            tokens = tokens[random_places((self.seed, first + i, 0), len(tokens), count)]
            chosen.append(torch.stack([torch.full_like(tokens, i), tokens]))
        prompt, place = torch.cat(chosen, 1)  # each (N,)
        return {
            "rows": held.tensor[prompt, place],
            "timestep": torch.zeros(len(place)),
            "branch": torch.zeros(len(place), dtype=torch.uint8),
            "image": (prompt + first).int(),
            "place": place.int(),
            "token": held.ids[prompt, place].int(),
        }


def text_arguments(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a pipeline's call that its text encoders depend on, with the defaults that images have.

    `encode_prompt` has other defaults in places: of PixArt-Sigma's captions, Sana's instruction, Qwen-Image's length.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise InputError(f"{type(pipe).__name__} has no encode_prompt, so that its text encoder cannot run alone.")
    encoder = inspect.signature(pipe.encode_prompt).parameters
    pipeline = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters
    shared = {name: p for name, p in pipeline.items() if name in encoder and p.kind is not p.VAR_KEYWORD}
    free = [name for name in shared if name not in ENCODER_SETS and not name.startswith("negative")]
    defaults = {name: shared[name].default for name in free if shared[name].default != encoder[name].default}
    return {**defaults, **{name: value for name, value in call.items() if name in free}}


def check_text_sites(pipe: Any, sites: Sequence[Site], tokens: str, branches: Sequence[str]) -> None:
    """Raise `InputError` unless the text encoders can be read for the prompts of these branches at these sites."""
    check_sites(pipe, sites, tokens)
    if tuple(branches) != ("cond",):
        raise InputError(
            f"Text encoders are read for the prompts alone, which are the branch cond, and not for "
            f"{', '.join(branches)}; capture {sites[0]} in a run of its own."
        )
