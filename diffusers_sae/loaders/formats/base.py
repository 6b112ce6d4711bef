"""What a format of SAE files declares of itself, and how files are matched with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...saes import SparseAutoencoder
from ..weights import Weights

TRANSFORMER_LENS = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Names of the tensors among those who come from TransformerLens; their `W_enc` is `(d, n)`."""
TRANSFORMER_LENS_GATED = ("W_enc", "b_gate", "W_dec", "b_dec", "r_mag", "b_mag")


@dataclass(frozen=True)
class Signature:
    """Names of the tensors by which files of a format are known; every other tensor is forbidden.

    Args:
        required: all are there.
        optional: those that are read where they are there.
        buffers: those that training left and that reading has no use for.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def missing(self, weights: Weights) -> list[str]:
        return [name for name in self.required if name not in weights.tensors]

    def forbidden(self, weights: Weights) -> list[str]:
        return sorted(set(weights.tensors) - {*self.required, *self.optional, *self.buffers})

    def matches(self, weights: Weights) -> bool:
        return not self.missing(weights) and not self.forbidden(weights)


@dataclass(frozen=True)
class Format:
    """A format of SAE files.

    Args:
        name: as in `config={"format": name}` and `diffusers-sae convert --to name`.
        whose: projects that write it.
        rule: how they get codes, in one line.
        signatures: of its tensors; those that match one of them may be of this format.
        convert: makes an SAE of ours of a file's tensors and config.
        marks: fields of the config, of which at least one has to be there.
        bars: fields of the config by which files of others are known.
        fits: what else decides, such as shapes.
        must_be_named: whether nothing in the files tells it from others', so that `format` has to.
        rows: the tensor whose rows are the features' directions as they are, if there is one.
        write: writes an SAE of ours as a folder in it, where that can be done.
    """

    name: str
    whose: str
    rule: str
    signatures: tuple[Signature, ...]
    convert: Callable[[Weights], SparseAutoencoder]
    marks: tuple[str, ...] = ()
    bars: tuple[str, ...] = ()
    fits: Callable[[Weights], bool] = lambda weights: True
    must_be_named: bool = False
    rows: str | None = None
    write: Callable[[SparseAutoencoder, Path], None] | None = None

    def is_marked(self, weights: Weights) -> bool:
        """Whether the config has a field that only this format has."""
        return any(name in weights.config for name in self.marks)

    def specificity(self, weights: Weights) -> tuple[bool, int] | None:
        """How much of a file's config and tensors the format asks for; `None` if it is of another."""
        if self.must_be_named or any(name in weights.config for name in self.bars):
            return None
        if (self.marks and not self.is_marked(weights)) or not self.fits(weights):
            return None
        required = [len(each.required) for each in self.signatures if each.matches(weights)]
        return (bool(self.marks), max(required)) if required else None

    def read(self, weights: Weights) -> SparseAutoencoder:
        """The SAE that a file of this format holds.

        Raises:
            InputError: a tensor is missing or of another shape, or there is one that the format has no use for.
        """
        sae = self.convert(weights)
        buffers = {name for each in self.signatures for name in each.buffers}
        unused = sorted(set(weights.tensors) - weights.used - buffers)
        if unused:
            raise weights.refuse(
                f"has {', '.join(unused)}, which an SAE such as this ({self.name}) has no use for; if it is of "
                "another format, pass config={'format': ...}"
            )
        return sae
