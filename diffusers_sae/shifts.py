"""Changes that no activation shapes: those of `add` depend on step, image and branch alone, so that they are computed
once a run, and a call of the site's module costs one addition."""

from __future__ import annotations

import torch

from .context import Context
from .delta import neutral
from .prepared import TABLE_LIMIT, PreparedEdit, check_images


class Shifts:
    """The sum of such edits of one SAE in one run."""

    def __init__(self, edits: list[PreparedEdit]) -> None:
        self._edits = edits
        self._each = [edit.table for edit in edits if edit.table is not None]
        self._tables: dict[tuple[tuple[str, ...], int], torch.Tensor] = {}

    def at(self, context: Context) -> torch.Tensor | None:
        """The change now, `(1 or rows of the batch, 1, d)` in fp32 and `neutral`, or `None` if there is none."""
        if not any(edit.needs(branch, context) for edit in self._edits for branch in context.branches):
            return None
        for edit in self._edits:
            check_images(edit.strengths[0].shape[1], context)
        if torch.compiler.is_compiling() or self._is_large(context):
            return self._of_batch([context.at_step(table) for table in self._each], context)[:, None]
        key = context.branches, context.images
        if key not in self._tables:
            self._tables[key] = self._of_batch(self._each, context)
        return context.at_step(self._tables[key])[:, None]

    def _is_large(self, context: Context) -> bool:
        """Whether a table for the rows of the batch would take more memory than it is worth."""
        return len(context.timesteps) * context.rows * self._edits[0].directions.shape[-1] > TABLE_LIMIT

    def _of_batch(self, tables: list[torch.Tensor], context: Context) -> torch.Tensor:
        """What the edits, `(..., 1 or images, d)` each, do to the rows of the batch: `(..., 1 or rows, d)`."""
        parts = [self._of_branch(tables, branch) for branch in context.branches]
        if len(parts) > 1:
            parts = [part.expand(*part.shape[:-2], context.images, -1) for part in parts]
        return neutral(torch.cat(parts, -2))

    def _of_branch(self, tables: list[torch.Tensor], branch: str) -> torch.Tensor:
        weights = [edit.edit.weights.get(branch, 0.0) for edit in self._edits]
        found = [weight * table for weight, table in zip(weights, tables, strict=True) if weight]
        return sum(found[1:], found[0]) if found else torch.zeros_like(tables[0][..., :1, :])
