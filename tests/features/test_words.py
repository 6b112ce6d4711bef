"""Names of latents, against loops that follow the definitions word by word."""

import itertools
import sys

import pytest
import torch
from conftest import random_sae

from diffusers_sae import InputError, Site, TopKSAE
from diffusers_sae.capture.text import TokenActivations
from diffusers_sae.features.words import (
    best_bound,
    best_for_words,
    latents_of,
    name_features,
    parts_of_speech,
    word_table,
    words_of,
)

VOCABULARY = ["<s>", "</s>", "cat</w>", "dog</w>", "sun", "flower</w>", ",</w>", "red</w>"]


class ClipLike:
    """A vocabulary with CLIP's marks at the ends of words."""

    all_special_ids = (0, 1)

    def __init__(self, vocabulary=VOCABULARY):
        self.vocabulary = vocabulary

    def convert_ids_to_tokens(self, ids):
        return [self.vocabulary[i] for i in ids]

    def decode(self, ids):
        return "".join(self.vocabulary[i] for i in ids).replace("</w>", " ").replace("▁", " ")


def read(ids, seed, words=VOCABULARY):
    ids = torch.tensor(ids)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(len(words), 8, generator=torch.Generator().manual_seed(9))
    tensor = 3 * table[ids] + torch.randn(*ids.shape, 8, generator=generator)
    return TokenActivations(Site("text_encoder.x"), ["…"] * len(ids), tensor, ids, ids > 1)


def drawn(seed, count=40):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        middle = [[2], [3], [4, 5], [7], [6]]
        order = torch.randperm(5, generator=generator)[:3].tolist()
        ids = [0, *itertools.chain(*(middle[i] for i in order)), 1]
        rows.append(ids + [1] * (8 - len(ids)))
    return read(rows, seed)


def test_tokens_of_a_word_are_merged_and_commas_left_out():
    words = words_of(read([[0, 4, 5, 6, 2, 1, 1]], 0), ClipLike())
    assert [(w.text, w.prompt, w.positions) for w in words] == [("sunflower", 0, (1, 2)), ("cat", 0, (4,))]


def test_marks_at_the_beginnings_of_words():
    vocabulary = ["<s>", "</s>", "▁cat", "▁sun", "flower"]
    words = words_of(read([[3, 4, 2, 1]], 0, vocabulary), ClipLike(vocabulary))
    assert [(w.text, w.positions) for w in words] == [("sunflower", (0, 1)), ("cat", (2,))]


@torch.no_grad()
def by_definition(sae, seen, unit):
    """`[(activation by latent (n,), words)]` of every unit."""
    code = sae.encode(seen.tensor)
    words = words_of(seen, ClipLike())
    if unit == "word":
        return [(code[w.prompt, list(w.positions)].amax(0), {w.text}) for w in words]
    return [(code[i][seen.kept[i]].amax(0), {w.text for w in words if w.prompt == i}) for i in range(len(seen.prompts))]


@pytest.mark.parametrize("unit", ["word", "caption"])
def test_names_and_figures_follow_the_definitions(unit):
    torch.manual_seed(1)
    sae, seen, new = random_sae(8), drawn(1), drawn(2)
    features = name_features(sae, seen, new, ClipLike(), unit=unit)
    units, units_new = by_definition(sae, seen, unit), by_definition(sae, new, unit)
    firing = {j for j in range(sae.n_latents) if any(z[j] > 0 for z, _ in units)}
    assert {f.feature for f in features} == firing and len(firing) > 8
    for f in features:
        means = {
            word: float(torch.stack([z[f.feature] for z, held in units if word in held]).mean())
            for word in ("cat", "dog", "sunflower", "red")
        }
        assert f.word == max(means, key=means.get) and f.mean == pytest.approx(means[f.word], rel=1e-4)
        fires = [bool(z[f.feature] > f.bound) for z, _ in units_new]
        holds = [f.word in held for _, held in units_new]
        both = sum(a and b for a, b in zip(fires, holds, strict=True))
        assert f.precision == pytest.approx(both / max(1, sum(fires)))
        assert f.recall == pytest.approx(both / sum(holds)) and f.occurrences == sum(holds)
    assert [f.f1 for f in features] == sorted((f.f1 for f in features), reverse=True)


def test_no_bound_does_better():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        value = torch.randint(0, 6, (30,), generator=generator).float()  # with ties and zeros
        hit = torch.rand(30, generator=generator) < 0.1 + 0.12 * value

        def f1(bound, value=value, hit=hit):
            found = value > bound
            return 2 * float((found & hit).sum()) / float(found.sum() + hit.sum())

        assert f1(best_bound(value, hit)) == pytest.approx(max(f1(b + 0.5) for b in range(6)) if hit.any() else 0)


def test_a_bound_parts_values_that_no_number_lies_between():
    low = torch.tensor(1.0)
    value = torch.stack([low, low.nextafter(torch.tensor(2.0)), torch.tensor(-3.0)])
    assert (value > best_bound(value, torch.tensor([False, True, False]))).tolist() == [False, True, False]
    value = torch.tensor([3e38, 3.2e38])
    assert (value > best_bound(value, torch.tensor([False, True]))).tolist() == [False, True]
    assert best_bound(torch.tensor([-2.0, -1.0]), torch.tensor([False, True])) >= 0


@torch.no_grad()
def test_codes_below_zero_do_not_fire():
    torch.manual_seed(1)
    sae, seen, new = random_sae(8, n_latents=4, k=4), drawn(1), drawn(2)
    signed = TopKSAE(8, 4, 4, relu=False).eval()
    signed.load_state_dict(sae.state_dict())
    assert (signed.encode(seen.tensor) < 0).any()
    assert name_features(signed, seen, new, ClipLike()) == name_features(sae, seen, new, ClipLike())


def test_parts_of_speech_choose_among_names():
    torch.manual_seed(1)
    sae, seen, new = random_sae(8), drawn(1), drawn(2)
    parts = {"cat": "NOUN", "dog": "NOUN", "sunflower": "NOUN", "red": "VERB"}
    every, some = (name_features(sae, seen, new, ClipLike(), parts=p) for p in (None, parts))
    assert [f.feature for f in some] == [f.feature for f in every if f.word != "red"] and len(some) < len(every)
    assert {f.part_of_speech for f in some} == {"NOUN"}


def test_the_best_feature_of_a_word_and_all_of_them():
    torch.manual_seed(1)
    features = name_features(random_sae(8), drawn(1), drawn(2), ClipLike())
    best = best_for_words(features, 0.5)
    assert best and all(min(f.precision, f.recall) >= 0.5 for f in best.values())
    for word, one in best.items():
        assert one.f1 == max(f.f1 for f in features if f.word == word and min(f.precision, f.recall) >= 0.5)
        assert one.feature in latents_of(features, [word], 0.5)
        assert f"| {one.feature} | {word} |" in word_table(features)
    with pytest.raises(InputError, match="No latent tells zebra"):
        latents_of(features, ["zebra"])


def test_bad_input_gets_a_sentence():
    torch.manual_seed(1)
    seen = drawn(1)
    with pytest.raises(InputError, match="d_in=4"):
        name_features(random_sae(4), seen, seen, ClipLike())
    with pytest.raises(InputError, match="'noun' is nothing to detect"):
        name_features(random_sae(8), seen, seen, ClipLike(), unit="noun")
    with pytest.raises(InputError, match="No word occurs 999 times"):
        name_features(random_sae(8), seen, seen, ClipLike(), fewest=999)


def test_without_spacy_a_sentence_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(InputError, match=r"Parts of speech need spaCy.*diffusers_sae\[words\]"):
        parts_of_speech(["a cat"])


def test_a_model_that_is_not_there():
    pytest.importorskip("spacy")
    with pytest.raises(InputError, match="spaCy has no model 'nothing_at_all'"):
        parts_of_speech(["a cat"], "nothing_at_all")
