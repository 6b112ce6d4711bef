"""Sites: which tensor of a pipeline, how it becomes rows `(B, P, d)`, and how rows become it again."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import InputError
from .families import DENOISERS, image_maker_of
from .handover import Handover
from .layouts import LAYOUTS
from .nulls import without_nulls

KINDS = ("output", "input", "update")
STREAMS = ("image", "text")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
EMBEDS = ("image_embeds",)
"""Sites that are no module's output: what a denoiser is given beside the noise, in `added_cond_kwargs`, or what is
handed over before."""
ALIASES = {"w": "generator.w", "latent": "autoencoder.latent"}
"""Short names of paths."""


WRAPPERS = ("text_model", "language_model", "model")
"""Modules that some versions of transformers put around a text encoder's blocks, and others don't."""


def canonical_path(path: str) -> str:
    """A site's path as every version of transformers could call it: in text encoders, without what wraps the blocks."""
    component, _, rest = path.partition(".")
    unwrapped_rest = _unwrapped_path(rest) if component in TEXT_ENCODERS else ""
    return f"{component}.{unwrapped_rest}" if unwrapped_rest else path


def _unwrapped_path(rest: str) -> str:
    return ".".join(part for part in rest.split(".") if part not in WRAPPERS)


@dataclass(frozen=True)
class Site:
    """A named tensor of a pipeline.

    Its text, which `str` writes and `Site.of` reads, is the path and, after `@`, what differs from the defaults of
    kind, stream and layout: `unet.mid_block`, `unet.mid_block@input`, `unet.mid_block@update,channels`.

    Two sites are equal, and have the same text, if they name the same tensor in some version of transformers:
    `text_encoder.text_model.encoder.layers.10` is `text_encoder.encoder.layers.10`.

    Args:
        path: pipe-relative, such as `unet.up_blocks.1.attentions.1`; or `w`, StyleGAN's w with its layers as rows;
            or `latent`, a vector-latent VAE's; or `image_embeds`, what a Kandinsky 2.2 decoder or unCLIP is given of an
            image, or a prior makes, both with one row an image.
        kind: `output`, `input`, or `update` (output minus input).
        stream: `image` or `text`, where a block returns both.
        layout: `positions`: each spatial place or token is a row; `channels`: each channel's map is a row; `vector`:
            the whole map is one row.
    """

    path: str
    kind: str = "output"
    stream: str = "image"
    layout: str = "positions"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", ALIASES.get(self.path, self.path))
        if MARK in self.path:
            raise InputError(f"{self.path!r} is more than a path; pass Site.of({self.path!r}).")
        for name, known in WORDS.items():
            value = getattr(self, name)
            if value not in known:
                raise InputError(f"{value!r} is not a {name} of site; choose one of {', '.join(known)}.")

    @classmethod
    def of(cls, site: Site | str | dict[str, str]) -> Site:
        """A `Site` from itself, its text, or the dict that an SAE's config holds; raises `InputError` for others."""
        if isinstance(site, Site):
            return site
        if isinstance(site, str):
            return cls(**_read_text(site))
        values = without_nulls(site)
        known = [field.name for field in fields(cls)]
        if not isinstance(values, Mapping) or not isinstance(values.get("path"), str) or not set(values) <= set(known):
            raise InputError(f"{site!r} is no site; pass a path, or an object of a path and {', '.join(known[1:])}.")
        return cls(**values)

    @property
    def _identity(self) -> tuple[str, str, str, str]:
        return canonical_path(self.path), self.kind, self.stream, self.layout

    def __eq__(self, other: object) -> bool:
        return self._identity == other._identity if isinstance(other, Site) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity)

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @property
    def is_text_encoder(self) -> bool:
        """Whether it lies in what reads the prompt, before the denoising."""
        return self.path.partition(".")[0] in TEXT_ENCODERS

    @property
    def is_embeds(self) -> bool:
        """Whether it is an embedding of an image that one model gives to another."""
        return self.path in EMBEDS

    @property
    def has_one_row(self) -> bool:
        """Whether it has one row an image, so that nothing in it can be chosen."""
        return self.is_embeds or self.path == ALIASES["latent"]

    @property
    def has_tokens(self) -> bool:
        """Whether its rows are positions in a list (tokens of a prompt, layers of W+, channels), and no places."""
        if self.layout != "positions":
            return self.layout == "channels"
        return self.stream == "text" or self.is_text_encoder or self.path in ("generator.w", "generator.mapping")

    def __str__(self) -> str:
        words = [getattr(self, name) for name, known in WORDS.items() if getattr(self, name) != known[0]]
        return canonical_path(self.path) + (MARK + ",".join(words) if words else "")


def _read_text(text: str) -> dict[str, str]:
    """The arguments of `Site` that its text says; raises `InputError` for words that say nothing, or contradict."""
    path, mark, rest = text.partition(MARK)
    values = {"path": path}
    for word in [each.strip() for each in rest.split(",")] if mark else []:
        name = next((name for name, known in WORDS.items() if word in known), None)
        if name is None:
            known = [each for words in WORDS.values() for each in words]
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
            raise InputError(
                f"{word!r} in {text!r} is not a kind, stream or layout of site; the nearest is {near!r}, of "
                f"{', '.join(known)}."
            )
        if name in values:
            raise InputError(f"{text!r} says its {name} twice, {values[name]!r} and {word!r}; leave one out.")
        values[name] = word
    return values


MARK = "@"
"""What stands between the path and the rest in a site's text."""
WORDS = {"kind": KINDS, "stream": STREAMS, "layout": tuple(LAYOUTS)}
"""What a site can be besides its path; the first of each is the default."""


def grid_of(x: torch.Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a site's grid: a map's `(B, C, H, W)` own, or for tokens `(B, N, C)` the image's ratio."""
    if x.ndim == 4:
        return x.shape[2], x.shape[3]
    tokens, (height, width) = x.shape[1], image_size
    h = round((tokens * height / width) ** 0.5)
    if h == 0 or tokens % h or abs(tokens // h * height - h * width) > max(height, width):
        raise InputError(f"A site of {tokens} tokens has no {height}:{width} grid that a mask could cover; use a map.")
    return h, tokens // h


BLOCK_STREAMS: dict[str, tuple[int, int | None]] = {
    "JointTransformerBlock": (1, 0),
    "FluxTransformerBlock": (1, 0),
    "FluxSingleTransformerBlock": (1, 0),
    "Flux2TransformerBlock": (1, 0),
    "QwenImageTransformerBlock": (1, 0),
    "ChromaTransformerBlock": (1, 0),
    "CogView4TransformerBlock": (0, 1),
    "HunyuanVideoTransformerBlock": (0, 1),
    "FluxAttention": (0, 1),
    "Flux2Attention": (0, 1),
    "Attention": (0, 1),
}
"""Positions of the image and the text stream in what a block returns, by its class; the image comes first elsewhere."""


def _position(module: nn.Module, stream: str) -> int:
    position = BLOCK_STREAMS.get(type(module).__name__, (0, None))[STREAMS.index(stream)]
    if position is None:
        raise InputError(
            f"{type(module).__name__} returns no text stream; leave stream='text' out, or choose another block."
        )
    return position


def tensor_of(output: Any, module: nn.Module, stream: str = "image") -> torch.Tensor:
    """A stream's tensor in what a block returned: a tensor, a tuple, or one of diffusers' outputs."""
    if isinstance(output, torch.Tensor):
        return output
    values = output if isinstance(output, tuple) else tuple(output.values())
    position = _position(module, stream)
    tensor = values[position] if position < len(values) else None
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{type(module).__name__} returned no {stream} stream here; choose another block.")
    return tensor


def with_tensor(output: Any, tensor: torch.Tensor, module: nn.Module, stream: str = "image") -> Any:
    """`output` with a stream's tensor replaced; what was passed in is not changed."""
    if isinstance(output, torch.Tensor):
        return tensor
    position = _position(module, stream)
    if isinstance(output, tuple):
        return (*output[:position], tensor, *output[position + 1 :])
    return type(output)(**{key: tensor if i == position else value for i, (key, value) in enumerate(output.items())})


INPUT_NAMES = {"image": "hidden_states", "text": "encoder_hidden_states"}


def input_of(args: tuple, kwargs: dict[str, Any], stream: str = "image") -> torch.Tensor:
    """The hidden states that a block was called with; raises `InputError` if there are none of that stream."""
    name, i = INPUT_NAMES[stream], STREAMS.index(stream)
    given = kwargs[name] if name in kwargs else args[i] if i < len(args) else None
    if not isinstance(given, torch.Tensor):
        raise InputError(f"The block is given no {stream} stream ({name}); choose another block, or the kind output.")
    return given


def with_input(args: tuple, kwargs: dict[str, Any], stream: str, tensor: torch.Tensor) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a block with its hidden states replaced."""
    name = INPUT_NAMES[stream]
    if name in kwargs:
        return args, {**kwargs, name: tensor}
    i = STREAMS.index(stream)
    return (*args[:i], tensor, *args[i + 1 :]), kwargs


def update_of(output: torch.Tensor, given: torch.Tensor, site: Site) -> torch.Tensor:
    """Output minus input; raises `InputError` if their shapes differ, where a difference would broadcast or fail."""
    if output.shape != given.shape:
        raise InputError(
            f"{site} does not exist: the block returns {tuple(output.shape)} for an input of {tuple(given.shape)}, so "
            "that output minus input has no meaning; choose the kind output or input."
        )
    return output - given


class Place(NamedTuple):
    """A site's module, and the component of the pipeline that it lies in; of an argument, the component is both.

    `path` is the module's in the component. Adapters may put another module there.
    """

    root_name: str
    root: nn.Module
    module: nn.Module
    path: str = ""

    @property
    def is_argument(self) -> bool:
        """Whether the site is something that the module is given, and not what it returns."""
        return self.module is self.root and not isinstance(self.module, Handover)

    @property
    def runs_once(self) -> bool:
        """Whether it runs once a call, outside of any denoising."""
        return self.root_name not in DENOISERS


def unwrapped(module: Any) -> Any:
    """The module inside what `torch.compile` returns."""
    return getattr(module, "_orig_mod", module)


def resolve(pipe: Any, site: Site) -> Place:
    """Where `site.path` is; raises `InputError` with the nearest real names if there is no such module."""
    if site.is_embeds:
        return _place_of_argument(pipe, site)
    component, _, rest = site.path.partition(".")
    handed_over = [] if pipe._steering.handover is None else list(EMBEDS)
    maker = [] if handed_over and not hasattr(pipe, "unet") else [image_maker_of(pipe)[0]]
    steerable = [*maker, *(n for n in TEXT_ENCODERS if isinstance(getattr(pipe, n, None), nn.Module))]
    if component not in steerable:
        raise InputError(
            f"{site.path!r} is not a site of {type(pipe).__name__}; a path starts with {' or '.join(steerable)}"
            + "".join(f", or is {name}" for name in handed_over)
            + "."
        )
    root = unwrapped(getattr(pipe, component))
    modules = dict(root.named_modules())
    if not rest:
        lists = [f"{n}.0" for n, m in modules.items() if n and isinstance(m, nn.ModuleList)]
        blocks = lists or [n for n, _ in root.named_children()]
        raise InputError(
            f"{site.path!r} cannot be steered as a whole: sites are blocks in it; choose one of "
            f"{', '.join(f'{component}.{n}' for n in blocks[:3])}, for example."
        )
    if rest not in modules and component in TEXT_ENCODERS:
        rest = _elsewhere(rest, modules)
    if rest not in modules:
        near = difflib.get_close_matches(rest, modules, n=3, cutoff=0.0)
        raise InputError(
            f"{site.path!r} does not exist in {type(root).__name__}; the nearest are "
            f"{', '.join(f'{component}.{n}' for n in near)}."
        )
    return Place(component, root, modules[rest], rest)


def _elsewhere(rest: str, modules: Collection[str]) -> str:
    """The path under which this version of transformers has what `rest` names in another; `rest`, if there is none."""
    same = [name for name in modules if name and _unwrapped_path(name) == _unwrapped_path(rest) != ""]
    return same[0] if len(same) == 1 else rest


def _place_of_argument(pipe: Any, site: Site) -> Place:
    """Where it is handed over, or the denoiser, if it is given what the site names."""
    name, root = "handover", pipe._steering.handover
    if root is None:
        name, module = image_maker_of(pipe)
        root = unwrapped(module)
        config = getattr(root, "config", {})
        if config.get("addition_embed_type") != "image" and config.get("encoder_hid_dim_type") != "image_proj":
            raise InputError(f"The {name} of {type(pipe).__name__} is given no {site.path}; choose a block in it.")
    if (site.kind, site.stream, site.layout) != ("output", "image", "positions"):
        raise InputError(f"{site.path} has no kinds, streams or layouts; pass site={site.path!r} alone.")
    return Place(name, root, root)


def argument_of(kwargs: dict[str, Any], site: Site) -> torch.Tensor:
    """What a denoiser was given for the site, as rows `(B, 1, d)`."""
    return kwargs["added_cond_kwargs"][site.path][:, None]


def with_argument(kwargs: dict[str, Any], site: Site, rows: torch.Tensor) -> dict[str, Any]:
    """The denoiser's arguments with the site's replaced."""
    return {**kwargs, "added_cond_kwargs": {**kwargs["added_cond_kwargs"], site.path: rows[:, 0]}}
