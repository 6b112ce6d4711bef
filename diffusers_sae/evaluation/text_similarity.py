"""Similarity of images and texts by CLIP's two towers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL.Image import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from ..errors import InputError

PARTS = {
    "text_encoder": CLIPTextModelWithProjection,
    "image_encoder": CLIPVisionModelWithProjection,
    "tokenizer": AutoTokenizer,
    "image_processor": CLIPImageProcessor,
}


class TextSimilarity:
    """Cosines of image and text embeddings.

    `source` is a CLIP on the hub or in a folder, such as `openai/clip-vit-large-patch14`, or a folder with the parts
    `text_encoder`, `image_encoder`, `tokenizer` and `image_processor`.
    """

    def __init__(self, source: str | Path) -> None:
        apart = (Path(source) / "text_encoder").is_dir()
        try:
            loaded = {
                name: part.from_pretrained(source, **({"subfolder": name} if apart else {}))
                for name, part in PARTS.items()
            }
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{source} cannot be read as a CLIP ({reason}); pass its folder or hub name.") from None
        self._text, self._image = loaded["text_encoder"].float().eval(), loaded["image_encoder"].float().eval()
        self._tokenizer, self._processor = loaded["tokenizer"], loaded["image_processor"]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image], texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Cosine of every image with the text of its place, `(N,)`; raises `InputError` if the lists do not match."""
        if len(images) != len(texts) or not texts:
            raise InputError(f"There are {len(images)} images and {len(texts)} texts; pass one text for each image.")
        found = []
        for start in range(0, len(texts), batch_size):
            part = slice(start, start + batch_size)
            pixels = self._processor(images=list(images[part]), return_tensors="pt").pixel_values
            tokens = self._tokenizer(list(texts[part]), padding="max_length", truncation=True, return_tensors="pt")
            image = self._image(pixels).image_embeds
            text = self._text(tokens.input_ids).text_embeds
            found.append(F.cosine_similarity(image, text))
        return torch.cat(found)
