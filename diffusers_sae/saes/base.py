"""What every sparse autoencoder has: its parameters, its config, and how it is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from ..errors import InputError
from ..nulls import without_nulls
from .normalization import NORMS, checked_norm
from .ops import even, sampled_linear, sparse_decode
from .precision import at_least_fp32
from .saving import save, upload

if TYPE_CHECKING:
    from .statistics import LatentStatistics

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {}
"""Every architecture by the name of its class, which is what a saved config calls it."""

ALL = slice(None)
HUB = ("repo_id", "token", "private", "commit_message", "create_pr")

Architecture = TypeVar("Architecture", bound="type[SparseAutoencoder]")


def register_architecture(cls: Architecture) -> Architecture:
    """Class decorator: make an architecture loadable by its name."""
    if cls.__name__ in ARCHITECTURES:
        raise ValueError(f"An architecture named {cls.__name__} is registered already.")
    ARCHITECTURES[cls.__name__] = cls
    return cls


class SparseCode(NamedTuple):
    """The active latents of each row: `values` and `indices`, both `(..., k)`."""

    values: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def of(cls, z: torch.Tensor) -> SparseCode:
        """A dense code `(..., n)`; rows with fewer active latents than the fullest end in zeros.

        Latents below 0 are active, too; the largest magnitudes come first.
        """
        active = (z != 0).sum(-1)
        fullest = int(active.max()) if active.numel() else 0  # without rows there is none
        indices = z.abs().topk(max(1, fullest), dim=-1).indices
        return cls(z.gather(-1, indices), indices)


class SparseAutoencoder(ModelMixin, ConfigMixin):
    """A dictionary of `n_latents` directions for activations of width `d_in`.

    Parameters: `W_enc (n, d)`, `b_enc (n,)`, `W_dec (n, d)` whose row j is the direction of feature j, `b_dec (d,)`.
    A subclass defines `encode_sparse` and `encode_only` and registers its arguments as config, which also carries the
    **provenance**, a dict of plain values: the `site` (a dict with path, kind, stream and layout), the base model and
    its revision, and the scheduler, steps, guidance and resolution at which the activations were captured.
    In half precision it stores rounded weights, and computes with them in fp32: `sae.half()` gives what
    `sae.half().float()` does, in fp32.
    `statistics` and `labels` (`{feature: label}`) are those of its latents, where they are known; they are saved beside
    the weights.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    input_norm: str | None = None
    code_settings: tuple[str, ...] | None = None
    """Names of the arguments that shape codes beside the weights; of `None`, all but the provenance are taken to."""
    rows_apart: bool = True
    """Whether a row's code depends on nothing but the row, so that rows may be shuffled."""
    statistics: LatentStatistics | None = None
    labels: Mapping[int, str] | None = None

    def _make_parameters(self, d_in: int, n_latents: int, input_norm: str | None) -> None:
        """Random unit directions, the encoder tied to the decoder (Gao et al., 2024, section 2.4), zero biases."""
        self.input_norm = checked_norm(input_norm)
        directions = nn.functional.normalize(torch.randn(n_latents, d_in), dim=-1)
        self.W_dec = nn.Parameter(directions)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @torch.no_grad()
    def scale_input_(self, factor: float) -> None:
        """Make this an SAE of `factor * x`, in place: it then gives `factor` times the codes and reconstructions.

        So an SAE that was trained on scaled rows is brought back to raw ones. Directions stay, since every
        architecture is positively homogeneous; a subclass scales its thresholds too.
        """
        self.b_enc.mul_(factor)
        self.b_dec.mul_(factor)

    @property
    def d_in(self) -> int:
        return self.W_dec.shape[1]

    @property
    def n_latents(self) -> int:
        return self.W_dec.shape[0]

    _read: Callable[[], Mapping[str, torch.Tensor]] | None = None
    _read_rows: Callable[[Sequence[int]], torch.Tensor] | None = None

    def read_later(
        self,
        read: Callable[[], Mapping[str, torch.Tensor]],
        read_rows: Callable[[Sequence[int]], torch.Tensor],
    ) -> None:
        """Leave the weights of an SAE on the meta device where they are until they are needed.

        Args:
            read: gives the tensors of all parameters.
            read_rows: gives some rows of `W_dec`, which is all that an edit of mode `add` needs.
        """
        self._read, self._read_rows = read, read_rows

    def fetch(self) -> None:
        """Read the weights, if they are still on disk."""
        if self._read is not None:
            self.load_state_dict(self._read(), assign=True)
            self._read = self._read_rows = None
            self.requires_grad_(False)

    def decoder_rows(self, features: Sequence[int]) -> torch.Tensor:
        """The directions of some features, `(m, d)` in fp32."""
        if self._read_rows is not None:
            return self._read_rows(features).float()
        return self.W_dec.detach()[list(features)].float()

    @property
    def provenance(self) -> dict[str, Any]:
        """What is known of where the activations came from; what is null is not known."""
        return without_nulls(self.config.get("provenance") or {})

    def checked_feature(self, feature: Any) -> int:
        """`feature` as an int; raises `InputError` if it is none of this SAE's."""
        if not isinstance(feature, (int, np.integer)) or isinstance(feature, bool):
            raise InputError(f"{feature!r} is not a feature; pass its index, 0 to {self.n_latents - 1}.")
        if not 0 <= feature < self.n_latents:
            raise InputError(f"Feature {feature} is out of range; this SAE has the features 0 to {self.n_latents - 1}.")
        return int(feature)

    def normalized(self, x: torch.Tensor) -> torch.Tensor:
        """Rows `(..., d)` as the encoder takes them, in fp32; all that is said of x below is said of these."""
        return x.float() if self.input_norm is None else NORMS[self.input_norm](x.float()).rows

    def restored(self, x_hat: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """What a reconstruction of normalized rows means for the rows `x (..., d)` themselves."""
        if self.input_norm is None:
            return x_hat
        _, shift, scale = NORMS[self.input_norm](x.float())
        return shift + scale * x_hat

    def row_scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """How long one unit of a decoded change is in the rows `x (..., d)`, `(..., 1)`; `None` if 1 everywhere."""
        return None if self.input_norm is None else NORMS[self.input_norm](x.float()).scale

    def pre_activations(self, x: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        """`W_enc (x - b_dec) + b_enc` of some latents, or of all: `(..., d)` -> `(..., m)`, in fp32."""
        weight, bias = at_least_fp32(self.W_enc[latents]), at_least_fp32(self.b_enc[latents])
        return nn.functional.linear(self.normalized(x) - self.b_dec, weight, bias)

    def pre_activations_at(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Those of each row's own latents, `indices (N, m)`: `(N, d)` -> `(N, m)`, in fp32."""
        centred = self.normalized(x) - self.b_dec
        weight, bias = at_least_fp32(self.W_enc), at_least_fp32(self.b_enc)
        return sampled_linear(centred, weight, bias, indices.flatten(), even(indices)).view_as(indices)

    def encode_sparse(self, x: torch.Tensor) -> SparseCode:
        """The active latents of each row of `x (..., d)`."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Dense codes: `(..., d)` -> `(..., n)`."""
        values, indices = self.encode_sparse(x)
        return values.new_zeros(*x.shape[:-1], self.n_latents).scatter_(-1, indices, values)

    def encode_only(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """The codes of `features (m,)` alone, as `encode` gives them: `(..., d)` -> `(..., m)`."""
        raise NotImplementedError

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """`W_decᵀ z + b_dec`: `(..., n)` -> `(..., d)`."""
        return at_least_fp32(z) @ at_least_fp32(self.W_dec) + self.b_dec

    def decode_sparse(self, code: SparseCode) -> torch.Tensor:
        """What `decode` gives for the same code, from its active latents only."""
        k = code.indices.shape[-1]
        values, directions = at_least_fp32(code.values), at_least_fp32(self.W_dec)
        rows = sparse_decode(values.reshape(-1, k), code.indices.reshape(-1, k), directions, self.b_dec)
        return rows.view(*code.indices.shape[:-1], self.d_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction of `x (..., d)`."""
        return self.restored(self.decode_sparse(self.encode_sparse(x)), x)

    def save_pretrained(
        self,
        save_directory: str | Path,
        push_to_hub: bool = False,
        figures: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write config, safetensors, statistics, labels, a card and checksums; or upload them, too.

        Of another SAE that lies in the folder nothing is left: weights, statistics, labels, figures and card are
        replaced or deleted. Of the same SAE (saved again, as a variant or in shards), what is not given now is kept.
        A card that a person wrote or edited is kept as long as the SAE is the same; else it is renamed
        `README.old.md`, and a picture that it shows `picture.old.png`. Other files are left alone and never uploaded.

        Args:
            save_directory: the folder; one that is named by its site is found by `load_sae(..., subfolder=site)`. A
                `picture.png` in it is shown on the card.
            push_to_hub: upload these files, by `repo_id`, `token`, `private`, `commit_message` and `create_pr`.
            figures: of rows held out, for the card; NaN is written as null.
            kwargs: as of diffusers' models (`variant`, `max_shard_size`).

        Raises:
            InputError: labels or statistics are not of this SAE, or the folder is a file. Nothing is written.
        """
        hub = {key: kwargs.pop(key, None) for key in HUB}
        if not kwargs.get("is_main_process", True):
            return  # of several processes, one writes
        self.fetch()
        folder = Path(save_directory)
        write = super().save_pretrained
        names = save(self, folder, lambda fresh: write(fresh, **kwargs), figures)
        if push_to_hub:
            upload(folder, names, f"Upload {type(self).__name__}", hub)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Save into a temporary folder and upload that; takes what `save_pretrained` takes. Returns the repository."""
        hub = {"repo_id": repo_id, **{key: kwargs.pop(key, None) for key in HUB[1:]}}
        with TemporaryDirectory() as folder:
            write, figures = super().save_pretrained, kwargs.pop("figures", None)
            self.fetch()
            names = save(self, Path(folder), lambda fresh: write(fresh, **kwargs), figures)
            return upload(Path(folder), names, f"Upload {type(self).__name__}", hub)
