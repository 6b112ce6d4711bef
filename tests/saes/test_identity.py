"""What shapes the codes of an SAE, of every architecture."""

import hashlib

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config

from diffusers_sae import (
    BatchTopKSAE,
    ChannelAwareSAE,
    Directions,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    ReLUSAE,
    TopKSAE,
)
from diffusers_sae.saes import ARCHITECTURES, SparseAutoencoder
from diffusers_sae.saes.identity import fingerprint, fingerprints, settings_of

SAES = {
    "TopKSAE": (lambda: TopKSAE(8, 32, 4, relu=False), {"input_norm": None, "k": 4, "relu": False}),
    "BatchTopKSAE": (lambda: BatchTopKSAE(8, 32, 4, input_norm="layer_norm"), {"input_norm": "layer_norm"}),
    "MatryoshkaSAE": (lambda: MatryoshkaSAE(8, 32, 4), {"input_norm": None}),
    "JumpReLUSAE": (lambda: JumpReLUSAE(8, 32, 0.2, input_norm="constant_norm"), {"input_norm": "constant_norm"}),
    "GatedSAE": (lambda: GatedSAE(8, 32), {"input_norm": None}),
    "ReLUSAE": (lambda: ReLUSAE(8, 32, tied=True), {"input_norm": None}),
    "ChannelAwareSAE": (lambda: ChannelAwareSAE(16, 32, channels=4, k=2), {"channels": 4, "k": 2}),
    "Directions": (lambda: Directions(8, 3), {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_settings_of_every_architecture(name, tmp_path):
    make, settings = SAES[name]
    sae = make()
    assert settings_of(sae) == settings
    sae.save_pretrained(tmp_path)
    again = type(sae).from_pretrained(tmp_path)
    assert settings_of(again) == settings and fingerprint(again) == fingerprint(sae)


def test_settings_are_those_of_now():
    sae = TopKSAE(8, 32, np.int64(4))
    assert type(settings_of(sae)["k"]) is int
    sae.k = 1
    assert settings_of(sae)["k"] == 1
    assert settings_of(ChannelAwareSAE(16, 32, channels=4, k=2).thresholded_(None)) == {"channels": 4, "k": None}


class Grouped(SparseAutoencoder):
    """An architecture of somebody else's, that does not say which of its arguments shape codes."""

    @register_to_config
    def __init__(self, d_in, n_latents, groups=(2, 3), sharpness=0.5, kept=None, provenance=None):
        super().__init__()
        self._make_parameters(d_in, n_latents, None)
        self.sharpness = sharpness


def test_all_settings_count_of_an_architecture_that_does_not_say(recwarn):
    sae = Grouped(8, 32, provenance={"note": "a"})
    assert settings_of(sae) == {"groups": [2, 3], "sharpness": 0.5, "kept": None}
    sae.sharpness = 0.25
    assert settings_of(sae)["sharpness"] == 0.25
    assert not recwarn.list


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fingerprint_is_that_of_all_numbers_in_fp32(name):
    """As recipes of version 1 have it."""
    sae = SAES[name][0]()
    digest = hashlib.sha256()
    for key, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode() + tensor.float().numpy().tobytes())
    assert fingerprint(sae) == digest.hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fingerprint_does_not_depend_on_the_type_that_numbers_are_kept_in(name, dtype):
    sae, copy = SAES[name][0](), SAES[name][0]()
    copy.load_state_dict(sae.state_dict())
    assert fingerprint(copy) == fingerprint(sae)
    rounded = fingerprint(sae, dtype)
    assert rounded != fingerprint(sae)
    assert fingerprint(copy.to(dtype)) == fingerprint(copy.float()) == rounded
    assert fingerprints(copy, [torch.float32, dtype]) == dict.fromkeys(("float32", str(dtype)[6:]), rounded)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_has_a_part_in_the_fingerprint(name):
    sae = SAES[name][0]()
    before = fingerprint(sae)
    for tensor in sae.state_dict().values():
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1
        assert fingerprint(sae) != before
        tensor.copy_(kept)
    assert fingerprint(sae) == before
