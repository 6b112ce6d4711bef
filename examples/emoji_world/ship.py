"""Put the trained models into the package: `python ship.py`. fp16 safetensors, cards, licences of the drawings.

Writes `diffusers_sae/demo/models`: emoji-sd, emoji-clip, judge, emoji-kandinsky and the SAEs. What is there already is
replaced.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from diffusers import PriorTransformer, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from sprites import PACKAGES
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from diffusers_sae import TopKSAE
from diffusers_sae.checksums import write_checksums
from diffusers_sae.demo.judge import Judge
from diffusers_sae.demo.shipped import MODELS, SITES

COMMANDS = """\
pip install -e '.[world]'
python examples/emoji_world/sprites.py
python examples/emoji_world/train_autoencoder.py
python examples/emoji_world/train_clip.py
python examples/emoji_world/train_unet.py
python examples/emoji_world/train_judge.py
python examples/emoji_world/train_sae.py
python examples/emoji_world/choose_steering.py
python examples/emoji_world/train_kandinsky.py
python examples/emoji_world/ship.py"""

CARD = """\
---
license: apache-2.0
library_name: {library}
---
# {name}

{what}

**Made from** the drawings listed in `models/DRAWINGS.md` of the package, composed into 64 x 64 scenes by
`examples/emoji_world/canvas.py`. No other data, no pretrained weights.

**Made by** these commands, in this order (trained on 2 CPU cores in fp32, stored in fp16):

```
{commands}
```

**Figures** {figures}

**Licence** of the weights: Apache-2.0, as the code. The drawings keep their own.
"""

MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
SMOKE = argparse.Namespace(out=Path("outputs/shipped"))


def card(folder: Path, name: str, library: str, what: str, figures: str) -> None:
    text = CARD.format(name=name, library=library, what=what, figures=figures, commands=COMMANDS)
    (folder / "README.md").write_text(text)


def drawings() -> str:
    rows = [f"| `{p.name}` | {p.version} | {p.licence} | {p.authors} |" for p in PACKAGES.values()]
    return "\n".join(
        [
            "# Drawings",
            "",
            "The models were trained on images composed from these packages of the npm registry. The drawings",
            "themselves are not part of this package. Licences: Apache-2.0 in `LICENSE-APACHE-2.0.txt`, MIT below.",
            "",
            "| package | version | licence | authors |",
            "|---|---|---|---|",
            *rows,
            "",
            "## MIT License",
            "",
            "Copyright (c) Microsoft Corporation (Fluent Emoji). Copyright (c) 2023 LobeHub (the 3D bitmaps' package).",
            "",
            MIT,
        ]
    )


def kandinsky(source: Path, target: Path) -> None:
    """What emoji-kandinsky has beyond emoji-sd and emoji-clip."""
    target.mkdir()
    learned = {name: x.half() for name, x in load_file(source / "decoder.safetensors").items()}
    save_file(learned, target / "decoder.safetensors")
    encoder = CLIPVisionModelWithProjection.from_pretrained(source / "image_encoder")
    encoder.half().save_pretrained(target / "image_encoder")
    PriorTransformer.from_pretrained(source / "prior").half().save_pretrained(target / "prior")
    shutil.copytree(source / "prior_scheduler", target / "prior_scheduler")
    TopKSAE.from_pretrained(source / "sae").half().save_pretrained(target / "sae")
    for name in ("statistics.safetensors", "held_out.json"):
        shutil.copy(source / "sae" / name, target / "sae")
    write_checksums(target / "sae")
    figures = json.loads((source / "sae" / "held_out.json").read_text())
    card(
        target,
        "emoji-kandinsky",
        "diffusers",
        "A Kandinsky 2.2 in small. An embedding is a linear code of 128 numbers of what emoji-sd's U-Net reads of a "
        "picture's full caption (principal components of the text encoder's states), of which the part is taken that "
        "is a sum of one vector a value (cat, neon, red background, ...). The image tower, which began as "
        "emoji-clip's, sees the code in pictures, the prior predicts it from captions, and the decoder is emoji-sd's "
        "U-Net, whose projection of embeddings turns the code back into those states (`decoder.safetensors` holds what "
        "emoji-sd has not). `diffusers_sae.demo.kandinsky.load_kandinsky()` puts the pipeline together. `sae` is a "
        "TopK SAE of such codes and of the embeddings of renders.",
        f"SAE on embeddings held out: FVU {figures['fvu']:.4f}, L0 {figures['l0']:.0f}, dead latents "
        f"{100 * figures['dead']:.2f} %; pictures in `benchmarks/results/kandinsky.json`.",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"))
    parser.add_argument("--out", type=Path, default=MODELS)
    parser.add_argument("--smoke", action="store_true", help="don't replace the shipped models, only see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    staging = args.out.with_name(args.out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)

    pipe = StableDiffusionPipeline.from_pretrained(args.world / "emoji-sd", safety_checker=None)
    pipe.to(torch.float16).save_pretrained(staging / "emoji-sd")
    clip = args.world / "emoji-clip"
    for part, cls in (("text_encoder", CLIPTextModelWithProjection), ("image_encoder", CLIPVisionModelWithProjection)):
        cls.from_pretrained(clip / part).half().save_pretrained(staging / "emoji-clip" / part)
    for part in ("tokenizer", "image_processor"):
        shutil.copytree(clip / part, staging / "emoji-clip" / part)
    Judge.from_pretrained(args.world / "judge").half().save_pretrained(staging / "judge")
    shutil.copy(args.world / "judge" / "held_out.json", staging / "judge")
    for site in SITES:
        source, target = args.world / "saes" / site, staging / "saes" / site
        TopKSAE.from_pretrained(source).half().save_pretrained(target)
        for name in ("statistics.safetensors", "concepts.safetensors", "detectors.safetensors", "held_out.json"):
            shutil.copy(source / name, target)
        figures = json.loads((source / "held_out.json").read_text())
        card(
            target,
            f"TopK SAE of emoji-sd at {site}",
            "diffusers_sae",
            "A sparse autoencoder of the cond branch's activations at every timestep, with statistics of every latent "
            "(`statistics.safetensors`) and concept scores (`concepts.safetensors`), both for each timestep, and what "
            "tells the concepts of a prompt at the first step (`detectors.safetensors`).",
            f"on held-out images: FVU {figures['fvu']:.4f}, L0 {figures['l0']:.1f}, "
            f"dead latents {100 * figures['dead']:.2f} %; for each timestep in `held_out.json`.",
        )
        write_checksums(target)
    shutil.copy(args.world / "towards.json", staging)
    kandinsky(args.world / "emoji-kandinsky", staging / "emoji-kandinsky")
    accuracy = json.loads((staging / "judge" / "held_out.json").read_text())["accuracy"]
    card(
        staging / "judge",
        "The judge of the demo world",
        "diffusers_sae",
        "Names object, style, background, gender and skin tone of 64 x 64 images. It has never seen a generated image.",
        f"right on held-out real renders: {', '.join(f'{k} {100 * v:.2f} %' for k, v in accuracy.items())}.",
    )
    card(
        staging / "emoji-sd",
        "emoji-sd",
        "diffusers",
        "A Stable Diffusion pipeline in small: 64 x 64 images of emoji-like objects in 8 styles on 8 backgrounds. "
        "Works with `guidance_scale=4` and 20 steps.",
        "in `benchmarks/results/demo_quality.json`, made by `diffusers-sae evaluate`.",
    )
    card(
        staging / "emoji-clip",
        "emoji-clip",
        "transformers",
        "A CLIP text tower, which emoji-sd reads its prompts with, and the image tower it was trained with.",
        "none are claimed.",
    )
    (staging / "DRAWINGS.md").write_text(drawings())
    shutil.copy(Path(__file__).parents[2] / "LICENSE", staging / "LICENSE-APACHE-2.0.txt")
    shutil.rmtree(args.out, ignore_errors=True)
    staging.rename(args.out)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
