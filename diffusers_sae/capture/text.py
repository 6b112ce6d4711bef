"""Activations of a text encoder over many prompts: the encoder alone runs, and no image is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ..context import Context, TextContext
from ..errors import InputError
from ..hooks import Observer, SteeringRun
from ..layouts import LAYOUTS
from ..site_mapping import SiteMapping, distinct_sites
from ..sites import Site, resolve
from ..widths import check_update

KEEP: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "words": lambda ids, tokenizer: ~_special(ids, tokenizer),
    "padded": lambda ids, tokenizer: ~_beginning(ids, tokenizer),
    "all": lambda ids, tokenizer: torch.ones_like(ids, dtype=torch.bool),
}
"""Which tokens of `ids (N, P)` are kept: those of words; all but the one that begins the text; all.

The tokens that end and pad a text are read by the denoiser as well, and hold what the whole prompt says.
"""


@dataclass
class TokenActivations:
    """What a site of a text encoder held of some prompts.

    `tensor (N, P, d)` has a row for every token, `ids (N, P)` says which tokens those are, `kept (N, P)` which of them
    were asked for.
    """

    site: Site
    prompts: list[str]
    tensor: torch.Tensor
    ids: torch.Tensor
    kept: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """The rows that were asked for, `(M, d)` in fp32: each token is a sample."""
        return self.tensor[self.kept].float()


def tokenizer_of(pipe: Any, site: Site | str) -> Any:
    """The tokenizer of the text encoder that a site lies in; raises `InputError` if there is none."""
    component = Site.of(site).path.partition(".")[0]
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"), None)
    if not Site.of(site).is_text_encoder or tokenizer is None:
        raise InputError(f"{site} lies in no text encoder with a tokenizer; choose a layer of text_encoder.")
    return tokenizer


def check_sites(pipe: Any, sites: Sequence[Site], keep: str) -> None:
    """Raise `InputError` unless these sites of text encoders have tokens as rows, and `keep` chooses among those."""
    for at in sites:
        tokenizer_of(pipe, at)
        check_update(resolve(pipe, at), at)
        if at.layout != "positions":
            raise InputError(f"The rows of {at} are no tokens; use layout='positions'.")
    if keep not in KEEP:
        raise InputError(f"keep={keep!r} is no choice of tokens; choose one of {', '.join(KEEP)}.")


def stream_prompts(
    pipe: Any, site: Site | str, prompts: Iterable[str], *, batch_size: int = 64, keep: str = "words", **encode: Any
) -> Iterator[TokenActivations]:
    """Run the pipeline's `encode_prompt` and yield what a site of a text encoder held, a batch of prompts at a time.

    Edits in force at text encoders act, as they do in `pipe.capture`; reset the plan first to see the model itself, as
    for `name_features`. The denoiser does not run.

    Args:
        keep: which tokens' rows are kept: `words`; `padded`, all but the one that begins the text; or `all`.
        encode: goes to `encode_prompt`; give it the `max_sequence_length` that images are made with, since a T5 without
            an attention mask reads the padding too.

    Raises:
        InputError: no such site or kind of tokens, the site is in no text encoder, or a prompt is no string.
    """
    at = Site.of(site)
    for batch in stream_prompts_at(pipe, [at], prompts, batch_size=batch_size, keep=keep, **encode):
        yield batch[at]


def stream_prompts_at(
    pipe: Any,
    sites: Sequence[Site | str],
    prompts: Iterable[str],
    *,
    batch_size: int = 64,
    keep: str = "words",
    steered: bool = True,
    **encode: Any,
) -> Iterator[SiteMapping[TokenActivations]]:
    """`stream_prompts` for several sites, in one text encoder or in several, in one pass: `{site: what it held}`.

    Without `steered`, the plan rests while they run.
    """
    places = distinct_sites(sites)
    check_sites(pipe, places, keep)
    if isinstance(prompts, str):
        raise InputError(f"prompts takes a list of prompts; pass [{prompts!r}].")
    modules, stream, state = [resolve(pipe, at) for at in places], iter(prompts), pipe._steering
    while batch := list(islice(stream, batch_size)):
        if not all(isinstance(prompt, str) for prompt in batch):
            raise InputError("A prompt is no string; pass a list of strings.")
        seen: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}

        def take(site: Site, x: torch.Tensor, context: Context, seen: dict = seen) -> None:
            assert isinstance(context, TextContext)
            if site not in seen:  # later calls would be of negative prompts
                seen[site] = LAYOUTS[site.layout].to_rows(x).detach().cpu(), context.ids.cpu()

        observers = [Observer(at, module, take) for at, module in zip(places, modules, strict=True)]
        plan = nullcontext() if steered else state.unsteered()
        with plan, state.observed(observers), SteeringRun(state, pipe, {}, reads_only=True):
            _encode(pipe, batch, encode)
        read = {}
        for at in places:
            tensor, ids = seen.get(at, (torch.empty(0), torch.empty(0)))
            if len(tensor) != len(batch):
                raise InputError(f"{at} did not run once for every prompt in {type(pipe).__name__}.encode_prompt.")
            read[at] = TokenActivations(at, batch, tensor, ids, KEEP[keep](ids, tokenizer_of(pipe, at)))
        yield SiteMapping(read)


def read_prompts(pipe: Any, site: Site | str, prompts: Iterable[str], **options: Any) -> TokenActivations:
    """`stream_prompts`, with its options, all batches in one. Prompts that are padded to different lengths are refused.

    Raises `InputError` as that does, and if there is no prompt.
    """
    batches = list(stream_prompts(pipe, site, prompts, **options))
    if not batches:
        raise InputError("There are no prompts to read; pass at least one.")
    if len({batch.ids.shape[1] for batch in batches}) > 1:
        raise InputError("The batches have different numbers of tokens; go through stream_prompts one by one.")
    whole = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("tensor", "ids", "kept"))
    return TokenActivations(batches[0].site, [prompt for batch in batches for prompt in batch.prompts], *whole)


@torch.no_grad()
def _encode(pipe: Any, prompts: list[str], options: Mapping[str, Any]) -> None:
    """`pipe.encode_prompt` for prompts alone, with `None` for what else it must be given."""
    if not hasattr(pipe, "encode_prompt"):
        raise InputError(f"{type(pipe).__name__} has no encode_prompt, so that its text encoder cannot run alone.")
    parameters = inspect.signature(pipe.encode_prompt).parameters
    known = {
        "prompt": prompts,
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    unknown = set(options) - set(parameters)
    if unknown:
        raise InputError(f"{type(pipe).__name__}.encode_prompt takes no {', '.join(sorted(unknown))}; leave it out.")
    empty = {name: None for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    pipe.encode_prompt(**{**empty, **{name: value for name, value in known.items() if name in parameters}, **options})


def _special(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    return torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))


def _beginning(ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """The first token, where it is the one that begins every text."""
    begins = torch.zeros_like(ids, dtype=torch.bool)
    begins[:, 0] = ids[:, 0] == tokenizer.bos_token_id if tokenizer.bos_token_id is not None else False
    return begins
