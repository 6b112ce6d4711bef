"""Reading ahead: the same batches in the same order, no further than asked for, and errors where they belong."""

import threading

import pytest
import torch

from diffusers_sae.capture.prefetch import prefetched


def numbers(count, taken=None, fail_at=None):
    for i in range(count):
        if i == fail_at:
            raise OSError("the disk is gone")
        if taken is not None:
            taken.append(threading.current_thread())
        yield torch.tensor(i)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_batches_come_in_order(count):
    assert [int(x) for x in prefetched(numbers(count))] == list(range(count))


def test_another_thread_is_some_batches_ahead_and_no_more():
    taken: list = []
    batches = prefetched(numbers(100, taken), 3)
    assert int(next(batches)) == 0
    batches.close()  # waits for what was asked for
    assert 1 <= len(taken) <= 4 and threading.current_thread() not in taken


def test_an_error_comes_where_its_batch_would_have_come():
    batches = prefetched(numbers(5, fail_at=2))
    assert [int(next(batches)) for _ in range(2)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
