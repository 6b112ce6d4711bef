"""Choose how each concept is steered towards: `python choose_steering.py`. Writes `towards.json`.

Every concept starts from what suits its factor, and goes on to weaker or stronger, shorter or longer, fewer or more
sites as long as that brings the lower of two shares up: images in which the judge sees the concept, and images in which
all else is as before, each less its bar. Seeds are none that the evaluation uses. A stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffusers_sae import TopKSAE
from diffusers_sae.checksums import sha256
from diffusers_sae.demo.measure_steering import (
    TUNING_SEED,
    Towards,
    edits_towards,
    judged,
    silent_scenes,
    steering_rows,
)
from diffusers_sae.demo.shipped import SITES, load_judge, load_pipeline, load_scores
from diffusers_sae.demo.world import CONCEPTS
from diffusers_sae.evaluation.ledger import Ledger

START = {
    "object": Towards(SITES, strength=1.25, stop=0.6),
    "style": Towards(strength=2.5, stop=0.6),
    "background": Towards(SITES, strength=1.0, stop=0.3),
    "gender": Towards(strength=2.5),
    "skin": Towards(strength=1.5),
}
BARS = {"seen": 0.85, "kept": 0.80}
ENOUGH = 0.05
ROUNDS = 2
WINDOWS = (0.2, 0.3, 0.45, 0.6, 1.0)

SMOKE = argparse.Namespace(images=1, most=1)


def neighbours(how: Towards, stronger: bool) -> Iterator[Towards]:
    """Settings beside `how` that do more, or less."""
    yield how._replace(strength=round(how.strength * (1.35 if stronger else 0.75), 3))
    windows = [w for w in WINDOWS if (w > how.stop if stronger else w < how.stop)]
    if windows:
        yield how._replace(stop=windows[0] if stronger else windows[-1])
    sites = SITES if stronger else SITES[1:]
    if sites != how.sites:
        yield how._replace(sites=sites)


class Chooser:
    """Measures settings on the seeds of the choice, each once."""

    def __init__(self, world: Path, images: int) -> None:
        self._pipe, self._judge = load_pipeline(world / "emoji-sd"), load_judge(world / "judge")
        self._scores = load_scores(world / "saes")
        for site in SITES:
            self._pipe.load_sae(TopKSAE.from_pretrained(world / "saes" / site), site=site, adapter_name=site)
        files = sorted((world / "saes").rglob("*.safetensors"))
        self._ledger = Ledger(world / "training" / "choose_steering.jsonl", {str(p): sha256(p) for p in files})
        self._images = images

    def margins(self, concept: str, how: Towards) -> dict[str, float]:
        """By how much each share lies above its bar."""
        scenes = silent_scenes(CONCEPTS[concept], self._images, TUNING_SEED)

        def seen() -> list[Any]:
            return judged(self._pipe, self._judge, scenes, TUNING_SEED)

        bare = self._ledger.get(f"bare {CONCEPTS[concept]} {self._images}", seen)
        try:
            for edit in edits_towards(self._scores, concept, how):
                self._pipe.steer(**edit)
            steered = self._ledger.get(f"{concept} {self._images} {how}", seen)
        finally:
            self._pipe.reset_steering()
        rows = steering_rows(concept, scenes, bare, steered)
        return {share: rows.share(share).value - bar for share, bar in BARS.items()}

    def choose(self, concept: str) -> tuple[Towards, dict[str, float]]:
        """The setting that a climb from the factor's own ends at."""
        best = START[CONCEPTS[concept]]
        margins = self.margins(concept, best)
        for _ in range(ROUNDS):
            if min(margins.values()) >= ENOUGH:
                break
            stronger = margins["seen"] < margins["kept"]
            tried = [(self.margins(concept, how), how) for how in neighbours(best, stronger)]
            found, how = max(tried, key=lambda each: (min(each[0].values()), sum(each[0].values())))
            if min(found.values()) <= min(margins.values()):
                break
            best, margins = how, found
        return best, margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"))
    parser.add_argument("--images", type=int, default=24)
    parser.set_defaults(most=None)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    chooser = Chooser(args.world, args.images)
    chosen = {}
    for concept in tqdm(list(CONCEPTS)[: args.most], desc="concepts"):
        how, margins = chooser.choose(concept)
        chosen[concept] = how._asdict()
        tqdm.write(f"{concept}: {how}, above the bars by {', '.join(f'{k} {m:+.2f}' for k, m in margins.items())}")
    (args.world / "towards.json").write_text(json.dumps(chosen, indent=1) + "\n")


if __name__ == "__main__":
    main()
