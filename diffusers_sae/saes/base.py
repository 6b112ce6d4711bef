"""What every sparse autoencoder has: its parameters, its config, and how it is saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from torch import nn

from ..checksums import write_checksums
from ..errors import InputError
from .card import FIGURES, LABELS, write_card
from .normalization import NORMS, checked_norm
from .ops import even, sampled_linear, sparse_decode

if TYPE_CHECKING:
    from .statistics import LatentStatistics

ARCHITECTURES: dict[str, type[SparseAutoencoder]] = {}
"""Every architecture by the name of its class, which is what a saved config calls it."""

ALL = slice(None)

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
        indices = z.abs().topk(max(1, int((z != 0).sum(-1).max())), dim=-1).indices
        return cls(z.gather(-1, indices), indices)


class SparseAutoencoder(ModelMixin, ConfigMixin):
    """A dictionary of `n_latents` directions for activations of width `d_in`.

    Parameters: `W_enc (n, d)`, `b_enc (n,)`, `W_dec (n, d)` whose row j is the direction of feature j, `b_dec (d,)`.
    A subclass defines `encode_sparse` and `encode_only` and registers its arguments as config, which also carries the
    **provenance**, a dict of plain values: the `site` (a dict with path, kind, stream and layout), the base model and
    its revision, and the scheduler, steps, guidance and resolution at which the activations were captured.
    `statistics` and `labels` (`{feature: label}`) are those of its latents, where they are known; they are saved beside
    the weights.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    input_norm: str | None = None
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
        return dict(self.config.get("provenance") or {})

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
        return nn.functional.linear(self.normalized(x) - self.b_dec, self.W_enc[latents], self.b_enc[latents])

    def pre_activations_at(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Those of each row's own latents, `indices (N, m)`: `(N, d)` -> `(N, m)`, in fp32."""
        centred = self.normalized(x) - self.b_dec
        return sampled_linear(centred, self.W_enc, self.b_enc, indices.flatten(), even(indices)).view_as(indices)

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
        return z @ self.W_dec + self.b_dec

    def decode_sparse(self, code: SparseCode) -> torch.Tensor:
        """What `decode` gives for the same code, from its active latents only."""
        k = code.indices.shape[-1]
        rows = sparse_decode(code.values.reshape(-1, k), code.indices.reshape(-1, k), self.W_dec, self.b_dec)
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
        """Write config, safetensors, statistics, labels, a card and checksums; or upload the folder, too.

        Args:
            save_directory: the folder; one that is named by its site is found by `load_sae(..., subfolder=site)`. A
                `picture.png` in it is shown on the card; a card that is there already is kept.
            push_to_hub: upload the folder as it is, by `repo_id`, `token`, `private` and `commit_message`.
            figures: of rows held out, for the card.
            kwargs: as of diffusers' models.
        """
        hub = {key: kwargs.pop(key, None) for key in ("repo_id", "token", "private", "commit_message")}
        super().save_pretrained(save_directory, **kwargs)
        self._write_companions(Path(save_directory), figures)
        if push_to_hub:
            from huggingface_hub import HfApi

            api = HfApi(token=hub["token"])
            repo = api.create_repo(hub["repo_id"] or Path(save_directory).name, private=hub["private"], exist_ok=True)
            message = hub["commit_message"] or f"Upload {type(self).__name__}"
            api.upload_folder(repo_id=repo.repo_id, folder_path=save_directory, commit_message=message)

    def _write_companions(self, folder: Path, figures: Mapping[str, Any] | None) -> None:
        """What lies beside the weights."""
        if self.statistics is not None:
            self.statistics.save(folder)
        if figures is not None:
            (folder / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
        if self.labels:
            told = {str(self.checked_feature(feature)): label for feature, label in self.labels.items()}
            (folder / LABELS).write_text(json.dumps(told, indent=1) + "\n")
        arguments = {name: value for name, value in self.config.items() if name[:1] != "_" and name != "provenance"}
        write_card(folder, type(self).__name__, arguments, self.provenance, self.statistics is not None)
        write_checksums(folder)
