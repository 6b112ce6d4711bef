"""Similarity of images and texts, with the CLIP that ships and with one as the hub stores them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from diffusers_sae import InputError
from diffusers_sae.demo.shipped import MODELS
from diffusers_sae.evaluation.text_similarity import PARTS, TextSimilarity

FOLDER = MODELS / "emoji-clip"


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(3)]


def test_it_is_the_cosine_of_the_towers_embeddings():
    texts = ["a cat", "a red rocket", "a flat icon of a panda"]
    found = TextSimilarity(FOLDER)(pictures(), texts, batch_size=2)
    vision = CLIPVisionModelWithProjection.from_pretrained(FOLDER, subfolder="image_encoder").float()
    text = CLIPTextModelWithProjection.from_pretrained(FOLDER, subfolder="text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER, subfolder="tokenizer")
    for picture, words, cosine in zip(pictures(), texts, found, strict=True):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        ids = tokenizer(words, padding="max_length", return_tensors="pt").input_ids
        with torch.no_grad():
            a, b = vision(pixels).image_embeds[0], text(ids).text_embeds[0]
        assert float(cosine) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)


def test_a_clip_in_one_piece(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(
        CLIPConfig(
            text_config={
                **shape,
                "vocab_size": 600,
                "max_position_embeddings": 24,
                "eos_token_id": 1,
                "projection_dim": 8,
            },
            vision_config={**shape, "image_size": 64, "patch_size": 16, "projection_dim": 8},
            projection_dim=8,
        )
    ).eval()
    whole.save_pretrained(tmp_path)
    for name in ("tokenizer", "image_processor"):
        PARTS[name].from_pretrained(FOLDER, subfolder=name).save_pretrained(tmp_path)
    clip = TextSimilarity(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in pictures()])
    ids = tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = whole(input_ids=ids, pixel_values=pixels).logits_per_image[:, 0] / whole.logit_scale.exp()
    torch.testing.assert_close(clip(pictures(), ["a cat"] * 3), logits, atol=1e-4, rtol=1e-3)


def test_bad_input_gets_a_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a CLIP"):
        TextSimilarity(tmp_path)
    with pytest.raises(InputError, match="3 images and 1 texts"):
        TextSimilarity(FOLDER)(pictures(), ["a cat"])
