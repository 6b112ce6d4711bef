"""Reading ahead: the next batches are read and pinned while the last one is trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def prefetched(batches: Iterator[torch.Tensor], ahead: int = 2, *, pin: bool = False) -> Iterator[torch.Tensor]:
    """What `batches` yields, in its order; a thread takes up to `ahead` of them before they are asked for.

    Args:
        pin: put them into page-locked memory, from which a GPU fetches without the processor's waiting.

    Raises:
        Exception: what `batches` raises, where its batch would have come.
    """

    def taken() -> torch.Tensor | None:
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = deque(thread.submit(taken) for _ in range(ahead))
        while (batch := coming.popleft().result()) is not None:
            coming.append(thread.submit(taken))
            yield batch
