"""Widths of sites before a run: what is told of any block is what it holds, and updates that cannot be are refused."""

import warnings
from functools import partial

import pytest
import torch
from conftest import Harness, random_sae

from diffusers_sae import InputError, Site
from diffusers_sae.families import denoiser_of
from diffusers_sae.sites import resolve, tensor_of, update_of
from diffusers_sae.widths import changes_size, input_width_of, row_width_of, width_of

UP, LINEAR = "unet.up_blocks.1", "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
INPUTS = {
    UP: 16,  # its first resnet takes 16 + 16, with a skip connection
    "unet.up_blocks.0": 16,
    "unet.up_blocks.1.resnets.0": 24,  # which is given both
    "unet.down_blocks.1": 8,
    "unet.down_blocks.0.resnets.0": 8,
    "unet.mid_block": 16,
    "unet.mid_block.attentions.0": 16,
    "unet.mid_block.attentions.0.proj_in": 16,
    "unet.conv_in": 4,
    LINEAR: 64,
    "text_encoder.encoder.layers.0": 16,
    "text_encoder.encoder.layers.0.mlp.fc2": 24,
}
"""Widths of what blocks of the tiny Stable Diffusion are given."""
CHANGING = {
    "unet.down_blocks.0": "of maps of half the size and the same width",
    "unet.down_blocks.1": "of another width",
    UP: "of another width",
    "unet.up_blocks.0": "of maps of twice the size",
    "unet.up_blocks.1.resnets.0": "of another width",
    "unet.down_blocks.0.downsamplers.0": "of maps of half the size",
    "unet.down_blocks.0.downsamplers.0.conv": "of maps of half the size, by its stride",
    "unet.up_blocks.0.upsamplers.0": "of maps of twice the size",
    "unet.conv_in": "of another width",
    LINEAR: "of another width",
}
"""Blocks that return something of another size than they are given."""


def shapes_by_path(harness):
    """`{path: (shape of the hidden states given, shape returned)}` of all modules of the denoiser that have both."""
    name, denoiser = denoiser_of(harness.pipe)
    shapes = {}

    def note(path, module, args, kwargs, output):
        given = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(given, torch.Tensor) and given.ndim in (3, 4) and isinstance(output, (torch.Tensor, tuple)):
            try:
                returned = tensor_of(output, module)
            except InputError:
                return
            shapes[path] = tuple(given.shape), tuple(returned.shape)

    handles = [
        module.register_forward_hook(partial(note, f"{name}.{path}"), with_kwargs=True)
        for path, module in denoiser.named_modules()
        if path
    ]
    harness.run(num_inference_steps=2)
    for handle in handles:
        handle.remove()
    return shapes


def channels(shape):
    return shape[1] if len(shape) == 4 else shape[-1]


def test_what_is_told_of_a_block_is_what_it_holds(every):
    """Of every module of every denoiser: known widths are right, and no update is refused that there could be."""
    shapes = shapes_by_path(every)
    assert len(shapes) > 10
    for path, (given, returned) in shapes.items():
        place = resolve(every.pipe, Site(path))
        assert input_width_of(place) in (None, channels(given)), path
        assert width_of(place) in (None, channels(returned)), path
        assert not (changes_size(place) and given == returned), path


@pytest.mark.parametrize("path", INPUTS)
def test_an_sae_of_another_width_than_the_input_is_refused(sd, path):
    width, site = INPUTS[path], Site(path, kind="input")
    assert row_width_of(resolve(sd.pipe, site), site) == width
    with pytest.raises(InputError, match=f"takes activations of width {width + 1} and {site} has {width}"):
        sd.pipe.load_sae(random_sae(width + 1), site)
    assert sd.pipe.get_list_saes() == {}


@pytest.mark.parametrize("path", INPUTS)
def test_an_sae_of_the_width_of_the_input_steers(sd, path):
    """It is loaded, sees rows of that width, and changes the image."""
    site, bare = Site(path, kind="input"), sd.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sd.pipe.load_sae(random_sae(INPUTS[path]), site)
    with sd.pipe.capture([site]) as activations:
        assert torch.equal(bare, sd.run())
    assert activations[site].rows().shape[-1] == INPUTS[path]
    sd.pipe.steer({0: 8.0}, mode="set")
    assert not torch.equal(bare, sd.run())


@pytest.mark.parametrize("path", CHANGING)
def test_updates_of_blocks_that_change_the_size_are_refused(sd, path):
    site, sentence = Site(path, kind="update"), f"{path}@update.* does not exist: .* choose the kind output or input"
    width = width_of(resolve(sd.pipe, site))
    with pytest.raises(InputError, match=sentence):
        sd.pipe.load_sae(random_sae(width), site)
    with pytest.raises(InputError, match=sentence), sd.pipe.capture([site]):
        pass
    with pytest.raises(InputError, match=sentence), sd.pipe.capture([f"{path}@channels,update"]):
        pass
    assert sd.pipe.get_list_saes() == {}


def test_the_update_of_a_block_that_keeps_the_size_is_output_minus_input(sd):
    sites = [Site("unet.mid_block", kind=kind) for kind in ("output", "input", "update")]
    with sd.pipe.capture(sites) as held:
        sd.run()
    output, given, update = (held[site].tensor for site in sites)
    assert torch.equal(update, output - given)


@pytest.mark.parametrize("shapes", [((2, 8, 4, 4), (2, 8, 8, 8)), ((2, 5, 8), (2, 1, 8)), ((2, 5, 8), (2, 5, 1))])
def test_an_update_that_only_the_run_shows_to_be_none(shapes):
    """Shapes that would broadcast, too."""
    with pytest.raises(InputError, match="x.y@update does not exist: the block returns .* for an input of"):
        update_of(*map(torch.zeros, shapes), Site("x.y", kind="update"))


def test_widths_of_text_streams():
    flux = Harness("Flux")
    for kind in ("output", "input"):
        site = Site(f"{flux.tiny.site}.attn", kind=kind, stream="text")
        place = resolve(flux.pipe, site)
        assert row_width_of(place, site) == 32
        with pytest.raises(InputError, match=r"attn@.*text has 32"):
            flux.pipe.load_sae(random_sae(31), site)
