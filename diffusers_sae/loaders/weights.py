"""What lies in a weights file: its tensors, what is told beside them, and how formats ask for both."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..nulls import without_nulls
from ..saes import ARCHITECTURES, SparseAutoencoder

TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
"""By what the annotations of architectures call them."""
AT_ONCE = 2**22
"""Numbers that are looked at together, as looking at them takes more memory than they do."""


@dataclass(frozen=True)
class Weights:
    """Tensors by name (on the meta device, as long as the file is left on disk), the config, and where they lie.

    `used` are the names of the tensors that were asked for, so that what nobody asked for can be refused. What is
    `null` in the config is missing from it.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    origin: str
    folder: Path | None = None
    used: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", without_nulls(self.config))

    def has(self, *names: str) -> bool:
        return set(names) <= set(self.tensors)

    def section(self, name: str) -> Weights:
        """The object that the config has under this name, as a config of its own; empty where it has none."""
        told = self.config.get(name, {})
        if not isinstance(told, Mapping):
            raise self.refuse(f"comes with {name} = {_short(told)}, which must be an object")
        return Weights(self.tensors, told, self.origin, self.folder, self.used)

    def choice(self, name: str, known: Iterable[str], default: str, what: str | None = None) -> str:
        """One of these words that the config tells under this name; `what` it is, if not as it is called there."""
        told = self.config.get(name, default)
        if not isinstance(told, str) or told not in known:
            raise self.refuse(f"has the {what or name} {_short(told)}; known are {', '.join(known)}")
        return told

    def vector(self, name: str, length: int | None = None) -> torch.Tensor:
        """A tensor `(length,)` in fp32; of any length, if none is given."""
        tensor = self.floating(name)
        if tensor.ndim != 1 or (length is not None and len(tensor) != length):
            wanted = "one dimension" if length is None else f"shape ({length},)"
            raise InputError(f"{self.origin} has a {name} of shape {tuple(tensor.shape)}; it must have {wanted}.")
        return tensor.detach().float()

    def matrix(self, name: str, n: int, d: int, transposed: bool = False) -> torch.Tensor:
        """A matrix as `(n, d)` in fp32, whichever way it lies; if n = d, the other way if `transposed`."""
        tensor = self.floating(name)
        if tuple(tensor.shape) not in ((n, d), (d, n)):
            raise InputError(
                f"{self.origin} has a {name} of shape {tuple(tensor.shape)}; with {n} latents and width {d} it must be "
                f"({n}, {d}) or ({d}, {n})."
            )
        turn = transposed if n == d else tensor.shape[0] == d
        return (tensor.T if turn else tensor).detach().float().contiguous()

    def parts(
        self, W_enc: str, b_enc: str, W_dec: str, b_dec: str, turned: str | None = None
    ) -> dict[str, torch.Tensor]:
        """The four tensors that every SAE has, from these names, in our names and form.

        `turned` names the matrix that lies the other way there, `(d, n)`, which counts only where n = d.
        """
        bias, centre = self.vector(b_enc), self.vector(b_dec)
        n, d = len(bias), len(centre)
        return {
            "W_enc": self.matrix(W_enc, n, d, turned == "W_enc"),
            "b_enc": bias,
            "W_dec": self.matrix(W_dec, n, d, turned == "W_dec"),
            "b_dec": centre,
        }

    def scalar(self, name: str) -> float:
        tensor = self.tensor(name)
        if tensor.numel() != 1:
            raise InputError(f"{self.origin} has a {name} of shape {tuple(tensor.shape)}; it must be one number.")
        if tensor.is_complex() or tensor.isnan().any():
            raise InputError(f"{self.origin} has a {name} that is no number; fetch or train the SAE again.")
        return 0.0 if tensor.is_meta else float(tensor)

    def whole(self, *names: str) -> int:
        """A whole number above 0 that the config tells under the first of these names that it has."""
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(
                    f"{self.origin} comes with {name} = {_short(value)}; it must be a whole number above 0."
                )
            return value
        raise InputError(f"{self.origin} does not say {names[0]}; pass config={{{names[0]!r}: ...}}.")

    def number(self, name: str) -> float:
        """A finite number that the config tells under this name."""
        value = self.config.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise InputError(f"{self.origin} comes with {name} = {_short(value)}; it must be a finite number.")
        return float(value)

    def whole_tensor(self, name: str) -> int:
        """A tensor that is one whole number above 0; 1, as long as the file is left on disk."""
        value = self.scalar(name)
        if self.tensor(name).is_meta:
            return 1
        if not value.is_integer() or value < 1:
            raise InputError(f"{self.origin} has {name} = {value:g}; it must be a whole number above 0.")
        return int(value)

    def check_told(self, **told: int) -> None:
        """Raise `InputError` if the config tells other sizes than the tensors have; `None` and 0 tell none."""
        for name, size in told.items():
            value = self.config.get(name)
            if value not in (None, 0, size) or isinstance(value, bool):
                raise InputError(f"{self.origin} comes with {name} = {_short(value)}, and its tensors have {size}.")

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self.origin} {why}.")

    def floating(self, name: str) -> torch.Tensor:
        """A tensor as it is; raises `InputError` if it holds whole or complex numbers."""
        tensor = self.tensor(name)
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{self.origin} has a {name} of dtype {kind}, and weights must be floating-point numbers.")
        return tensor

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor as it is; raises `InputError` if there is none of that name."""
        self.used.add(name)
        if name not in self.tensors:
            raise InputError(f"{self.origin} has no {name}; it has {_some(self.tensors)}.")
        return self.tensors[name]


def build(kind: str, arguments: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], origin: str) -> Any:
    """An SAE of a kind from tensors in our names and form; raises `InputError` unless they agree."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    sae = _described(kind, arguments, shapes, origin)
    own = {name: tensors[name].detach().float() for name in sae.state_dict()}
    for tensor in own.values():
        if not tensor.is_meta and not all(part.isfinite().all() for part in tensor.flatten().split(AT_ONCE)):
            raise InputError(f"{origin} has weights that are not finite; fetch or train the SAE again.")
    sae.load_state_dict(own, assign=True)
    return sae


def without_shift(W_enc: torch.Tensor, b_enc: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    """`b` such that `W_enc (x - b_dec) + b = W_enc x + b_enc`, summed in float64."""
    moved = [rows.double() @ b_dec.double() for rows in W_enc.split(4096)]
    return (b_enc.double() + torch.cat(moved)).float()


def _described(
    kind: str, arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], origin: str
) -> SparseAutoencoder:
    """The SAE that arguments and the shapes of its tensors tell of, without weights (on the meta device)."""
    if kind not in ARCHITECTURES:
        raise InputError(f"{origin} is a {kind}, which is not known; known are {', '.join(ARCHITECTURES)}.")
    if len(shapes.get("W_dec", ())) != 2 or 0 in shapes["W_dec"]:
        raise InputError(f"{origin} has no matrix W_dec (latents, width), whose rows are the features' directions.")
    n, d = shapes["W_dec"]
    for name, size in (("n_latents", n), ("d_in", d)):
        if arguments.get(name, size) != size:
            raise InputError(f"{origin} comes with {name} = {_short(arguments[name])}, and its tensors have {size}.")
    _check_arguments(kind, arguments, origin)
    try:
        with torch.device("meta"):
            sae = ARCHITECTURES[kind](**{**arguments, "d_in": d, "n_latents": n})
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{origin} cannot be made a {kind} ({error}); pass what is missing as config={{...}}."
        ) from None
    wanted = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    missing = [name for name in wanted if name not in shapes]
    if missing:
        raise InputError(f"{origin} has no {', '.join(missing)}; a {kind} has the tensors {', '.join(wanted)}.")
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise InputError(
                f"{origin} has a {name} of shape {shapes[name]}; with W_dec ({n}, {d}) it must be {shape}."
            )
    return sae


def _check_arguments(kind: str, arguments: Mapping[str, Any], origin: str) -> None:
    """Raise `InputError` if a config has something that its class does not take, or of another type."""
    known = inspect.signature(ARCHITECTURES[kind].__init__).parameters
    for name, value in without_nulls(arguments).items():
        if name not in known:
            raise InputError(
                f"{origin} comes with {name} = {_short(value)}, which a {kind} has no use for; leave it out, "
                "or tell what it is by config={'format': ...}."
            )
        wanted = str(known[name].annotation).partition(" ")[0]
        types = TYPES.get(wanted, (object,))
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types and object not in types):
            raise InputError(f"{origin} comes with {name} = {_short(value)}; it must be of type {wanted}.")


def _short(value: Any) -> str:
    """A value of a config, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _some(names: Mapping[str, Any]) -> str:
    shown = list(names)[:8]
    return (", ".join(shown) or "nothing") + (", ..." if len(names) > len(shown) else "")
