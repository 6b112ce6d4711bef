"""Names for the latents of a text encoder's SAE: the words on which they fire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..capture.text import TokenActivations
from ..errors import InputError
from ..saes import SparseAutoencoder, SparseCode
from .bounds import midway
from .tokens import Word, words_of

__all__ = [
    "DESCRIPTIVE",
    "UNITS",
    "Firings",
    "Units",
    "Word",
    "WordFeature",
    "best_bound",
    "best_for_words",
    "firings",
    "latents_of",
    "name_features",
    "parts_of_speech",
    "word_table",
    "words_of",
]

DESCRIPTIVE = ("NOUN", "PROPN", "ADJ", "ADV")
"""Parts of speech that can name an attribute (Olson et al., 2025, section 4.1: nouns, adjectives and adverbs)."""


class Units(NamedTuple):
    """What a latent is a detector on, occurrences of words or whole captions, and which words are in each.

    `tokens (2, L)`: prompt and position of every token, and `unit (L,)` the unit that it belongs to, of `size`.
    `pairs (2, E)`: units and the words that they hold, as places in the list of names.
    """

    size: int
    tokens: torch.Tensor
    unit: torch.Tensor
    pairs: torch.Tensor

    def holding(self, word: int) -> torch.Tensor:
        """`(size,)` bool: units that hold the word."""
        held = torch.zeros(self.size, dtype=torch.bool)
        held[self.pairs[0, self.pairs[1] == word]] = True
        return held

    def means(self, activation: torch.Tensor, words: int) -> torch.Tensor:
        """Mean activation `(words,)` over the units that hold each word, from that of every unit `(size,)`."""
        total = torch.zeros(words).index_add_(0, self.pairs[1], activation[self.pairs[0]])
        return total / torch.bincount(self.pairs[1], minlength=words).clamp(min=1)


def _occurrences(seen: TokenActivations, words: Sequence[Word], names: Sequence[str]) -> Units:
    place = {name: i for i, name in enumerate(names)}
    tokens = [(word.prompt, p, o) for o, word in enumerate(words) for p in word.positions]
    pairs = [(o, place[word.text]) for o, word in enumerate(words) if word.text in place]
    return _units(len(words), tokens, pairs)


def _captions(seen: TokenActivations, words: Sequence[Word], names: Sequence[str]) -> Units:
    place = {name: i for i, name in enumerate(names)}
    tokens = [(prompt, p, prompt) for prompt, p in seen.kept.nonzero().tolist()]
    pairs = sorted({(word.prompt, place[word.text]) for word in words if word.text in place})
    return _units(len(seen.prompts), tokens, pairs)


def _units(size: int, tokens: Sequence[tuple[int, int, int]], pairs: Sequence[tuple[int, int]]) -> Units:
    prompt, position, unit = torch.tensor(tokens, dtype=torch.long).reshape(-1, 3).T
    held = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    return Units(size, torch.stack([prompt, position]), unit, held)


UNITS = {"word": _occurrences, "caption": _captions}
"""What a latent may be taken to detect: the word it fires on, or captions that hold it (on any of their tokens)."""


class Firings(NamedTuple):
    """Where latents fire, each `(E,)` and sorted by latent: which, in which of `size` units, how strongly at most."""

    latent: torch.Tensor
    unit: torch.Tensor
    value: torch.Tensor
    size: int

    def of(self, latent: int) -> torch.Tensor:
        """Activation of one latent in every unit, `(size,)`."""
        start, stop = torch.searchsorted(self.latent, torch.tensor([latent, latent + 1])).tolist()
        dense = torch.zeros(self.size)
        dense[self.unit[start:stop]] = self.value[start:stop]
        return dense


@torch.no_grad()
def firings(sae: SparseAutoencoder, seen: TokenActivations, units: Units, chunk: int = 8192) -> Firings:
    """Where the latents of `sae` are above 0, by unit; codes are made of `chunk` tokens at a time and kept sparse.

    A signed code that is below 0 counts as one that does not fire: a latent finds a word by being large on it.
    """
    keys, values = [torch.empty(0, dtype=torch.long)], [torch.empty(0)]
    for part in torch.arange(len(units.unit)).split(chunk):
        prompt, position = units.tokens[:, part]
        code = sae.encode_sparse(seen.tensor[prompt, position].float().to(sae.W_dec.device))
        code = SparseCode(code.values.float().cpu(), code.indices.cpu())
        on = code.values > 0
        keys.append((code.indices * units.size + units.unit[part][:, None])[on])
        values.append(code.values[on])
    unique, place = torch.cat(keys).unique(return_inverse=True)  # sorted
    most = torch.zeros(len(unique)).scatter_reduce_(0, place, torch.cat(values), "amax")
    return Firings(unique // units.size, unique % units.size, most, units.size)


@dataclass(frozen=True)
class WordFeature:
    """A latent, the word that names it, and how well it tells that word from all others.

    Args:
        feature: index of the latent.
        word: the word of the largest mean activation.
        mean: that activation.
        bound: activation above which the latent finds the word; chosen for the best F1 on captions seen.
        precision, recall: of that detector on captions held out.
        occurrences: units held out that hold the word.
        others: further words with their mean activation, the largest first.
        part_of_speech: universal tag of the word, if it was asked for.
    """

    feature: int
    word: str
    mean: float
    bound: float
    precision: float
    recall: float
    occurrences: int
    others: tuple[tuple[str, float], ...] = ()
    part_of_speech: str | None = None

    @property
    def f1(self) -> float:
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def name_features(
    sae: SparseAutoencoder,
    seen: TokenActivations,
    held_out: TokenActivations,
    tokenizer: Any,
    *,
    unit: str = "caption",
    fewest: int = 5,
    parts: Mapping[str, str] | None = None,
    keep: Iterable[str] = DESCRIPTIVE,
) -> list[WordFeature]:
    """Every latent that fires with the word of its largest mean activation, the best detectors first.

    Args:
        seen, held_out: of the SAE's site, read with no edit in force there. Word and bound are chosen on the first,
            precision and recall measured on the second.
        unit: `word`: a latent belongs to the word on which it fires; `caption`: to the word in whose captions it fires,
            be it on later tokens, which know what came before.
        fewest: occurrences in `seen` that a word needs to name a latent.
        parts: `{word: part of speech}`, from `parts_of_speech`; only latents whose word is one of `keep` are returned.

    Raises:
        InputError: the SAE has another width than the site, an unknown unit, or no word occurs often enough.
    """
    if seen.tensor.shape[-1] != sae.d_in:
        raise InputError(
            f"The SAE has d_in={sae.d_in} and {seen.site} a width of {seen.tensor.shape[-1]}; "
            "read the prompts at the SAE's site."
        )
    if unit not in UNITS:
        raise InputError(f"unit={unit!r} is nothing to detect; choose one of {', '.join(UNITS)}.")
    words, new = words_of(seen, tokenizer), words_of(held_out, tokenizer)
    counts = Counter(word.text for word in words)
    names = sorted(name for name, count in counts.items() if count >= fewest)
    if not names:
        raise InputError(f"No word occurs {fewest} times in the {len(seen.prompts)} prompts; read more of them.")
    units, units_new = UNITS[unit](seen, words, names), UNITS[unit](held_out, new, names)
    there, there_new = firings(sae, seen, units), firings(sae, held_out, units_new)
    found = []
    for latent in there.latent.unique().tolist():
        activation = there.of(latent)
        mean = units.means(activation, len(names))
        top = mean.topk(min(4, int((mean > 0).sum()))).indices.tolist()
        if not top or (parts is not None and parts.get(names[top[0]]) not in set(keep)):
            continue
        bound = best_bound(activation, units.holding(top[0]))
        fires, holds = there_new.of(latent) > bound, units_new.holding(top[0])
        hits = int((fires & holds).sum())
        found.append(
            WordFeature(
                latent, names[top[0]], float(mean[top[0]]), bound,
                precision=hits / max(1, int(fires.sum())),
                recall=hits / max(1, int(holds.sum())),
                occurrences=int(holds.sum()),
                others=tuple((names[other], float(mean[other])) for other in top[1:]),
                part_of_speech=None if parts is None else parts.get(names[top[0]]),
            )
        )  # fmt: skip
    return sorted(found, key=lambda feature: -feature.f1)


def best_bound(value: torch.Tensor, hit: torch.Tensor) -> float:
    """The bound, at least 0, for which `value > bound` has the best F1 as a detector of `hit`, both `(N,)`.

    It lies halfway between two values, or at the lower one if no number lies between them.
    """
    value = value.clamp(min=0)
    order = value.argsort(descending=True)
    ordered, hits = value[order], hit[order].cumsum(0)  # the first i + 1 are found
    f1 = 2 * hits / (torch.arange(1, len(value) + 1) + hit.sum())
    below = torch.cat([ordered[1:], ordered.new_zeros(1)])
    f1 = torch.where(ordered > below, f1, -1.0)  # equal values cannot be parted
    i = int(f1.argmax())
    return midway(below[i], ordered[i])


def best_for_words(features: Iterable[WordFeature], least: float = 0.8) -> dict[str, WordFeature]:
    """`{word: its best feature}`, where precision and recall are at least `least`."""
    chosen: dict[str, WordFeature] = {}
    for one in sorted(features, key=lambda feature: -feature.f1):
        if min(one.precision, one.recall) >= least:
            chosen.setdefault(one.word, one)
    return chosen


def latents_of(features: Iterable[WordFeature], words: Collection[str], least: float = 0.8) -> list[int]:
    """All latents that some words name and that tell them with at least this precision; a word often has several.

    Raises `InputError` if there are none.
    """
    found = sorted(one.feature for one in features if one.word in words and one.precision >= least)
    if not found:
        raise InputError(f"No latent tells {', '.join(words)} with a precision of {least}; lower it, or train longer.")
    return found


def word_table(features: Iterable[WordFeature]) -> str:
    """A Markdown table of features and their words."""
    lines = ["| feature | word | mean | precision | recall | fires on too |", "|---|---|---|---|---|---|"]
    for f in features:
        others = ", ".join(f"{word} {mean:.2g}" for word, mean in f.others)
        lines.append(f"| {f.feature} | {f.word} | {f.mean:.3g} | {f.precision:.2f} | {f.recall:.2f} | {others} |")
    return "\n".join(lines)


def parts_of_speech(prompts: Iterable[str], model: str = "en_core_web_sm") -> dict[str, str]:
    """`{word: universal part of speech}`, the commonest of each word in the prompts; by spaCy (`[words]`).

    Raises `InputError` if spaCy or its model is not installed.
    """
    tag = _tagger(model)
    counts: dict[str, Counter[str]] = {}
    for tagged in tag(prompts):
        for word, part in tagged:
            counts.setdefault(word.lower(), Counter())[part] += 1
    return {word: each.most_common(1)[0][0] for word, each in counts.items()}


def _tagger(model: str) -> Callable[[Iterable[str]], Iterable[list[tuple[str, str]]]]:
    try:
        import spacy
    except ImportError:
        raise InputError(
            "Parts of speech need spaCy, which is not installed; pip install 'diffusers_sae[words]'."
        ) from None
    try:
        nlp = spacy.load(model, exclude=["parser", "ner"])
    except OSError:
        raise InputError(
            f"spaCy has no model {model!r}; install one (python -m spacy download {model}) or name one that is there."
        ) from None
    return lambda prompts: ([(token.text, token.pos_) for token in doc] for doc in nlp.pipe(prompts))
