"""Values by site: looked up by a site, its text or its path, and no site twice."""

import pickle

import pytest

from diffusers_sae import InputError, Site
from diffusers_sae.site_mapping import SiteMapping, distinct_sites

OUTPUT, INPUT, UPDATE = (Site("unet.mid_block", kind=kind) for kind in ("output", "input", "update"))
LAYER = "text_encoder.text_model.encoder.layers.0"


def test_two_sites_of_one_path_are_two_entries():
    mapping = SiteMapping({OUTPUT: 1, "unet.mid_block@input": 2, "unet.mid_block@channels": 3})
    assert list(mapping) == [OUTPUT, INPUT, Site("unet.mid_block", layout="channels")]
    assert list(mapping.values()) == [1, 2, 3]
    assert mapping[OUTPUT] == mapping["unet.mid_block"] == mapping["unet.mid_block@output"] == 1
    assert mapping[INPUT] == mapping["unet.mid_block@input"] == 2


def test_a_path_finds_the_only_site_that_has_it():
    mapping = SiteMapping({UPDATE: 1, Site(LAYER, kind="input"): 2, "w@channels": 3})
    assert mapping["unet.mid_block"] == 1
    assert mapping[LAYER] == mapping["text_encoder.encoder.layers.0"] == 2
    assert mapping["w"] == mapping["generator.w"] == 3


@pytest.mark.parametrize("asked", [OUTPUT, INPUT, "unet.mid_block@input", "unet.mid_block@output", "unet.up_blocks.0"])
def test_a_site_that_is_not_there(asked):
    """A site or a text with words is that site alone, whatever else its path has."""
    mapping = SiteMapping({UPDATE: 1})
    assert asked not in mapping and mapping.get(asked) is None
    with pytest.raises(KeyError):
        mapping[asked]
    with pytest.raises(InputError) as error:
        mapping[asked]
    assert str(error.value) == f"There is no entry of {asked}; choose one of unet.mid_block@update.".replace(
        "@output", ""
    )


def test_a_path_of_several_sites_is_refused():
    with pytest.raises(InputError, match="is the path of several sites: unet.mid_block@input, unet.mid_block@update"):
        SiteMapping({INPUT: 1, UPDATE: 2})["unet.mid_block"]
    with pytest.raises(InputError, match="choose one of none"):
        SiteMapping()["unet.mid_block"]


@pytest.mark.parametrize(
    ("sites", "sentence"),
    [
        (["unet.mid_block", "unet.mid_block"], "The site unet.mid_block is named twice"),
        (["unet.mid_block", OUTPUT], "unet.mid_block is named twice"),
        (["unet.mid_block", "unet.mid_block@output"], "named twice, as 'unet.mid_block' and 'unet.mid_block@output'"),
        ([UPDATE, {"path": "unet.mid_block", "kind": "update"}], "unet.mid_block@update is named twice"),
        (["unet.mid_block@update,channels", "unet.mid_block@channels,update"], "update,channels is named twice"),
        ([LAYER, "text_encoder.encoder.layers.0"], f"named twice, as '{LAYER}' and 'text_encoder.encoder.layers.0'"),
        ([Site(LAYER), Site("text_encoder.encoder.layers.0")], f"named twice, as '{LAYER}' and"),
        (["w", "generator.w"], "generator.w is named twice, as 'w' and 'generator.w'"),
        ("unet.mid_block", r"Sites are passed as a list; pass \['unet.mid_block'\]"),
        (INPUT, r"Sites are passed as a list; pass \['unet.mid_block@input'\]"),
    ],
)
def test_a_site_twice_is_refused(sites, sentence):
    with pytest.raises(InputError, match=sentence):
        distinct_sites(sites)
    if isinstance(sites, list):
        with pytest.raises(InputError, match=sentence):
            SiteMapping((site, 1) for site in sites)


def test_copies_hold_the_same():
    mapping = SiteMapping({UPDATE: 1})
    assert dict(pickle.loads(pickle.dumps(mapping))) == dict(mapping) == {UPDATE: 1}
    assert repr(mapping) == "SiteMapping({'unet.mid_block@update': 1})"
