"""Train emoji-clip, both towers and the tokenizer: `python train_clip.py`. Writes `emoji-clip` and the text side of
`emoji-sd`.

Contrastive training (Radford et al., 2021) of images against captions.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from canvas import Canvas
from loop import Losses, arguments, fit, parse, to_tensor
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from diffusers_sae.demo.world import sample_caption, sample_scene

MAX_TOKENS = 24


def new_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE whose merges make one token of every word of the captions."""
    rng = random.Random(0)
    captions = [sample_caption(sample_scene(rng), rng) for _ in range(5000)]
    tokenizer = CLIPTokenizer(model_max_length=MAX_TOKENS).train_new_from_iterator(
        captions, vocab_size=1024, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.model_max_length = MAX_TOKENS
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str], device: str) -> torch.Tensor:
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return ids.input_ids.to(device)  # (N, MAX_TOKENS)


class TwoTowers(nn.Module):
    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        shape = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 4, "projection_dim": 128}
        self.text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                max_position_embeddings=MAX_TOKENS,
                num_hidden_layers=4,
                pad_token_id=tokenizer.pad_token_id,
                **ids,
                **shape,
            )
        )
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(num_hidden_layers=6, image_size=64, patch_size=8, **shape)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.5))


def main() -> None:
    args = parse(arguments(__doc__, steps=450, batch=256, lr=1e-3))
    canvas = Canvas(args.world / "sprites.npz")
    tokenizer = new_tokenizer()
    towers = TwoTowers(tokenizer).to(args.device)

    def losses(step: int, rng: random.Random) -> Losses:
        scenes = [sample_scene(rng) for _ in range(args.batch)]
        pixels = to_tensor([canvas.render(s, rng) for s in scenes], args.device)
        captions = [sample_caption(s, rng) for s in scenes]
        read = towers.text(tokenize(tokenizer, captions, args.device)).text_embeds.float()  # (N, 128)
        seen = towers.vision(pixels).image_embeds.float()  # (N, 128)
        logits = towers.log_scale.exp().clamp(max=100) * F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).T
        target = torch.arange(args.batch, device=logits.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "top1": (logits.argmax(-1) == target).float().mean().detach()}

    fit(towers, losses, args, name="clip", every=50, weight_decay=0.05)
    clip = args.world / "emoji-clip"
    towers.vision.save_pretrained(clip / "image_encoder")
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(clip / "image_processor")
    towers.text.save_pretrained(clip / "text_encoder")
    tokenizer.save_pretrained(clip / "tokenizer")
    CLIPTextModel.from_pretrained(clip / "text_encoder").save_pretrained(args.world / "emoji-sd" / "text_encoder")
    tokenizer.save_pretrained(args.world / "emoji-sd" / "tokenizer")


if __name__ == "__main__":
    main()
