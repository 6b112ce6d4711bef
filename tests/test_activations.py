"""What a capture holds of several sites of one path: for each what it holds alone."""

import itertools

import pytest
import torch
from conftest import SITE, Harness

from diffusers_sae import InputError, Site
from diffusers_sae.sites import KINDS

LAYER = "text_encoder.encoder.layers.0"
SITES_OF_A_PATH = {
    "Stable Diffusion": [
        f"{SITE}@{kind},{layout}" for kind, layout in itertools.product(KINDS, ("positions", "vector"))
    ],
    "SDXL": [f"unet.mid_block@{kind}" for kind in KINDS],
    "Flux": [f"transformer.transformer_blocks.0@{kind},{stream}" for kind in KINDS for stream in ("image", "text")],
    "Stable Diffusion 3": [f"transformer.transformer_blocks.0@{stream}" for stream in ("image", "text")],
    "PixArt-Sigma": [f"text_encoder.encoder.block.0@{kind}" for kind in KINDS],
    "Kandinsky 2.2": ["unet.up_blocks.0.attentions.0@update", "unet.up_blocks.0.attentions.0@channels"],
}
"""Several sites of one path, by pipeline."""


def captured(harness, sites):
    with harness.pipe.capture(sites) as activations:
        harness.run(num_inference_steps=2)
    return activations


@pytest.mark.parametrize("kind", SITES_OF_A_PATH)
def test_sites_of_one_path_hold_what_each_holds_alone(kind):
    sites, harness = SITES_OF_A_PATH[kind], Harness(kind)
    together = captured(harness, sites)
    assert list(together) == [Site.of(site) for site in sites]
    for site in sites:
        alone = captured(harness, [site])[site]
        assert together[site].site == Site.of(site) and together[site].calls == alone.calls
        assert torch.equal(together[site].tensor, alone.tensor) and together[site].branch == alone.branch
        assert torch.equal(together[site].rows(), alone.rows())


def test_a_path_alone_is_the_output_or_the_only_site_of_it(sd):
    held = captured(sd, [SITE, f"{SITE}@input", "unet.mid_block@update"])
    assert held[SITE].site == Site(SITE)
    assert held["unet.mid_block"].site == Site("unet.mid_block", kind="update")
    held = captured(sd, [f"{SITE}@update", f"{SITE}@input"])
    with pytest.raises(InputError, match=f"{SITE} is the path of several sites: {SITE}@update, {SITE}@input"):
        held[SITE]


@pytest.mark.parametrize(
    "sites",
    [
        [SITE, SITE],
        [SITE, Site(SITE)],
        [f"{SITE}@update,channels", f"{SITE}@channels,update"],
        [LAYER, LAYER.replace("encoder.", "encoder.text_model.", 1)],
    ],
)
def test_a_site_twice_is_refused(sd, sites):
    with pytest.raises(InputError, match="is named twice"), sd.pipe.capture(sites):
        pass
