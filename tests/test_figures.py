"""The READMEs' figures are recomputed from `benchmarks/results`; none stands there that does not follow from them."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest
from statements import RESULTS, ROOT, of_the_choices, of_the_demo, of_the_kinds, of_the_systems, of_training, results
from statements_of_examples import (
    of_every_timestep,
    of_h_space,
    of_kandinsky,
    of_the_models,
    of_the_text_encoder,
    of_the_vae,
)

from diffusers_sae.demo.quality import fingerprint
from diffusers_sae.evaluation.shares import wilson

STATEMENTS = {
    "README.md": lambda: [
        *of_the_demo(), *of_the_kinds(), *of_the_choices(), *of_the_systems(), *of_training(),
    ],
    "examples/every_timestep/README.md": of_every_timestep,
    "examples/kandinsky/README.md": of_kandinsky,
    "examples/h_space/README.md": of_h_space,
    "examples/text_encoder/README.md": of_the_text_encoder,
    "examples/vae/README.md": of_the_vae,
    "examples/stylegan/README.md": list,
}  # fmt: skip

NOT_MEASURED = {
    "README.md": ["95 % intervals over distinct images"],
    "examples/every_timestep/README.md": [],
    "examples/kandinsky/README.md": ["95 % intervals over", "the aim (85 % and 85 %)"],
    "examples/h_space/README.md": ["EV 0.90, cosine 0.95 at 95 % zeros"],
    "examples/text_encoder/README.md": ["about 10 % fire on descriptive words"],
}
"""Percentages that no result could change: an interval's confidence, what the papers report, an aim."""


def words_of(readme: str) -> str:
    """The text in one line, without marks of emphasis."""
    return re.sub(r"\s+", " ", (ROOT / readme).read_text().replace("**", ""))


@pytest.mark.parametrize("readme", STATEMENTS)
def test_statements_follow_from_the_results(readme):
    text = words_of(readme)
    missing = [sentence for sentence in STATEMENTS[readme]() if sentence not in text]
    assert not missing, f"{readme} does not say: " + "\n".join(missing)


@pytest.mark.parametrize("readme", STATEMENTS)
def test_no_percentage_stands_beside_the_results(readme):
    text = words_of(readme)
    for sentence in [*STATEMENTS[readme](), *NOT_MEASURED.get(readme, [])]:
        text = text.replace(sentence, "…")
    assert re.findall(r".{0,60}\d %.{0,20}", text) == []


def test_cards_say_what_was_measured():
    for card, sentence in of_the_models().items():
        assert sentence in words_of(card), card


def test_the_results_are_of_the_models_that_ship():
    assert results("demo_quality")["weights"] == fingerprint()


def amendments() -> Any:
    spec = importlib.util.spec_from_file_location("intervals", RESULTS / "intervals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pooled_shares_have_the_intervals_of_distinct_images():
    for name, amend in amendments().FILES.items():
        figures = results(name)
        amend(figures)
        assert figures == results(name), name


def test_the_objects_ira_is_of_224_images():
    ira = results("demo_quality")["objects"]["ira"]
    assert (ira["value"], ira["low"], ira["high"]) == (0.9552, 0.9196, 0.9755)
    assert (ira["images"], ira["judgements"], ira["interval"]) == (224, 6048, "Wilson, distinct images")


@pytest.mark.parametrize("name", sorted(file.stem for file in RESULTS.glob("*.json")))
def test_every_interval_is_that_of_its_images(name):
    """Whatever is pooled says how its interval was made, and no interval is narrower than its images allow."""

    def shares(told: Any, path: str = "") -> Any:
        if isinstance(told, dict):
            if told.keys() >= {"value", "low", "high", "images"} and told["value"] is not None:
                yield path, told
            for key, value in told.items():
                yield from shares(value, f"{path}/{key}")
        elif isinstance(told, list):
            for i, value in enumerate(told):
                yield from shares(value, f"{path}/{i}")

    for path, share in shares(results(name)):
        method = share.get("interval", "Wilson")
        assert ("judgements" in share) == (method != "Wilson"), path
        if method != "bootstrap over images":
            total = share.get("judgements", share["images"])
            low, high = wilson(round(share["value"] * total) / total, share["images"])
            assert (share["low"], share["high"]) == pytest.approx((low, high), abs=1e-4), path


def test_artefacts_say_what_they_count():
    told = results("demo_quality")
    for part in (told["styles"], told["objects"]):
        if part["seed"] == part["tuning_seed"]:  # older than rows
            assert part["artefacts"]["counts"] == "all images, the removed factor included"
            edited = part["artefacts_edited"]
            assert edited["judgements"] == round(part["edited"]["value"] * part["edited"]["judgements"])
            assert round(edited["value"] * edited["judgements"]) == round(
                part["artefacts"]["value"] * part["artefacts"]["judgements"]
            )
        for name in ("ira", "cra"):
            assert abs(part[name]["value"] - part[f"{name}_bare"]["value"]) <= part["edited"]["value"]


def test_the_readme_says_whether_seeds_were_shared():
    told, text = results("demo_quality"), words_of("README.md")
    removals = [told["styles"], told["objects"]]
    shared = any(part["seed"] == part["tuning_seed"] for part in removals)
    assert ("beside curves (below) that share prompts and noise with the grid" in text) == shared
    apart = all(abs(f["seed"] - f["tuning_seed"]) >= 32 for f in told["steering"].values())
    assert ("How concepts are steered towards was chosen on other noise than it is measured on" in text) == apart
