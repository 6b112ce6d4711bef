"""Names for the latents of a text encoder's SAE: the words on which they fire."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..capture.text import TokenActivations
from ..errors import InputError
from ..saes import SparseAutoencoder

DESCRIPTIVE = ("NOUN", "PROPN", "ADJ", "ADV")
"""Parts of speech that can name an attribute (Olson et al., 2025, section 4.1: nouns, adjectives and adverbs)."""

END_OF_WORD, STARTS_OF_WORD = "</w>", ("▁", "Ġ")
"""How tokenizers mark words: CLIP's the last token of one, SentencePiece and byte-level BPE the first."""


class Word(NamedTuple):
    """One occurrence of a word: number of its prompt, and the positions of its tokens in it."""

    text: str
    prompt: int
    positions: tuple[int, ...]


def words_of(seen: TokenActivations, tokenizer: Any) -> list[Word]:
    """The words of all prompts in order, tokens that are one word merged, signs of punctuation left out."""
    special = set(tokenizer.all_special_ids)
    found = []
    for prompt, ids in enumerate(seen.ids.tolist()):
        places = [p for p, i in enumerate(ids) if i not in special]
        tokens = tokenizer.convert_ids_to_tokens([ids[p] for p in places])
        for group in _merged(tokens):
            positions = tuple(places[g] for g in group)
            text = tokenizer.decode([ids[p] for p in positions]).strip().lower()
            if any(letter.isalnum() for letter in text):
                found.append(Word(text, prompt, positions))
    return found


def _merged(tokens: Sequence[str]) -> list[list[int]]:
    """Numbers of the tokens of each word."""
    ends = any(token.endswith(END_OF_WORD) for token in tokens)
    groups: list[list[int]] = []
    for i, token in enumerate(tokens):
        begins = i == 0 or (tokens[i - 1].endswith(END_OF_WORD) if ends else token.startswith(STARTS_OF_WORD))
        if begins:
            groups.append([])
        groups[-1].append(i)
    return groups


class Firings(NamedTuple):
    """Where latents fire on words, each `(E,)` and sorted by latent: which, on which occurrence, how strongly.

    A latent's activation on a word is its largest on the word's tokens.
    """

    latent: torch.Tensor
    occurrence: torch.Tensor
    value: torch.Tensor

    def of(self, latent: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Occurrences and values of one latent."""
        start, stop = torch.searchsorted(self.latent, torch.tensor([latent, latent + 1])).tolist()
        return self.occurrence[start:stop], self.value[start:stop]


@torch.no_grad()
def firings(sae: SparseAutoencoder, seen: TokenActivations, words: Sequence[Word], chunk: int = 8192) -> Firings:
    """Where the latents of `sae` fire on `words`; codes are made of `chunk` tokens at a time and kept sparse."""
    occurrence = torch.tensor([o for o, word in enumerate(words) for _ in word.positions], dtype=torch.long)
    prompt = torch.tensor([word.prompt for word in words for _ in word.positions], dtype=torch.long)
    position = torch.tensor([p for word in words for p in word.positions], dtype=torch.long)
    keys, values = [], []
    for part in torch.arange(len(occurrence)).split(chunk):
        code = sae.encode_sparse(seen.tensor[prompt[part], position[part]].float())
        on = code.values > 0
        keys.append((code.indices * len(words) + occurrence[part][:, None])[on])
        values.append(code.values[on])
    unique, place = torch.cat(keys).unique(return_inverse=True)  # sorted
    most = torch.zeros(len(unique)).scatter_reduce_(0, place, torch.cat(values), "amax")
    return Firings(unique // len(words), unique % len(words), most)


@dataclass(frozen=True)
class WordFeature:
    """A latent, the word that names it, and how well it tells that word from all others.

    Args:
        feature: index of the latent.
        word: the word of the largest mean activation.
        mean: that activation, over all occurrences of the word.
        bound: activation above which the latent finds the word; chosen for the best F1 on captions seen.
        precision, recall: of that detector over occurrences of words in captions held out.
        occurrences: how often the word occurs in those.
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
    fewest: int = 5,
    parts: Mapping[str, str] | None = None,
    keep: Iterable[str] = DESCRIPTIVE,
) -> list[WordFeature]:
    """Every latent that fires on words with the word of its largest mean activation, the best detectors first.

    Args:
        seen, held_out: of the SAE's site. Word and bound are chosen on the first, precision and recall measured on the
            second.
        fewest: occurrences in `seen` that a word needs to name a latent.
        parts: `{word: part of speech}`, from `parts_of_speech`; only latents whose word is one of `keep` are returned.

    Raises:
        InputError: the SAE has another width than the site, or no word occurs often enough.
    """
    if seen.tensor.shape[-1] != sae.d_in:
        raise InputError(
            f"The SAE has d_in={sae.d_in} and {seen.site} a width of {seen.tensor.shape[-1]}; "
            "read the prompts at the SAE's site."
        )
    words, new = words_of(seen, tokenizer), words_of(held_out, tokenizer)
    counts = Counter(word.text for word in words)
    names = sorted(name for name, count in counts.items() if count >= fewest)
    if not names:
        raise InputError(f"No word occurs {fewest} times in the {len(seen.prompts)} prompts; read more of them.")
    total = torch.tensor([counts[name] for name in names])
    index, index_new = _index(words, names), _index(new, names)  # -1 for rare words
    there, there_new = firings(sae, seen, words), firings(sae, held_out, new)
    found = []
    for latent in there.latent.unique().tolist():
        at, value = there.of(latent)
        best = _best_words(index[at], value, total)
        if not best or (parts is not None and parts.get(names[best[0][0]]) not in set(keep)):
            continue
        (word, mean), rest = best[0], best[1:]
        bound = best_bound(value, index[at] == word, int(total[word]))
        at_new, value_new = there_new.of(latent)
        hits = index_new[at_new][value_new > bound] == word
        occurrences = int((index_new == word).sum())
        found.append(
            WordFeature(
                latent, names[word], mean, bound,
                precision=int(hits.sum()) / max(1, len(hits)),
                recall=int(hits.sum()) / max(1, occurrences),
                occurrences=occurrences,
                others=tuple((names[other], m) for other, m in rest),
                part_of_speech=None if parts is None else parts.get(names[word]),
            )
        )  # fmt: skip
    return sorted(found, key=lambda feature: -feature.f1)


def _index(words: Sequence[Word], names: Sequence[str]) -> torch.Tensor:
    place = {name: i for i, name in enumerate(names)}
    return torch.tensor([place.get(word.text, -1) for word in words])


def _best_words(
    word: torch.Tensor, value: torch.Tensor, total: torch.Tensor, count: int = 4
) -> list[tuple[int, float]]:
    """Up to `count` words with their mean activation over all their occurrences, `total (V,)`, the largest first."""
    known = word >= 0
    mean = torch.zeros(len(total)).index_add_(0, word[known], value[known]) / total
    top = mean.topk(min(count, int((mean > 0).sum())))
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def best_bound(value: torch.Tensor, hit: torch.Tensor, positives: int) -> float:
    """The bound for which `value > bound` has the best F1 as a detector of `hit`, both `(E,)`.

    `positives` counts those that should be found, also where nothing fires. The bound lies halfway between two values.
    """
    order = value.argsort(descending=True)
    sorted_value, hits = value[order], hit[order].cumsum(0)  # the first i + 1 are found
    f1 = 2 * hits / (torch.arange(1, len(value) + 1) + positives)
    below = torch.cat([sorted_value[1:], sorted_value.new_zeros(1)])
    f1 = torch.where(sorted_value > below, f1, -1.0)  # equal values cannot be parted
    i = int(f1.argmax())
    return float(sorted_value[i] + below[i]) / 2


def best_for_words(features: Iterable[WordFeature], least: float = 0.8) -> dict[str, WordFeature]:
    """`{word: its best feature}`, where precision and recall are at least `least`."""
    chosen: dict[str, WordFeature] = {}
    for one in sorted(features, key=lambda feature: -feature.f1):
        if min(one.precision, one.recall) >= least:
            chosen.setdefault(one.word, one)
    return chosen


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
