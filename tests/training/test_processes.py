"""Several processes: all that were started take part, or a sentence says why not. Real ones run in test_faults.py."""

import pytest
from accelerate import Accelerator

from diffusers_sae import InputError
from diffusers_sae.training.processes import (
    SIZES,
    check_processes,
    check_same_step,
    make_accelerator,
    run_in_main,
    started_processes,
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in (*SIZES, "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("name", SIZES)
def test_launchers_say_how_many_processes_they_started(environment, name):
    assert started_processes() == 1
    environment.setenv(name, "3")
    assert started_processes() == 3


def test_accelerate_launch_that_started_one_process_of_several_is_refused(environment):
    environment.setenv("ACCELERATE_MIXED_PRECISION", "no")  # what it sets for one process
    assert started_processes() == 1
    environment.setenv("MASTER_ADDR", "127.0.0.1")  # and for several
    with pytest.raises(InputError, match="asked for several processes and started one, .* torch.distributed.run"):
        started_processes()
    environment.setenv("PMI_SIZE", "2")  # through an MPI
    assert started_processes() == 2


def test_an_accelerator_of_fewer_processes_than_were_started_is_refused(environment):
    accelerator = Accelerator(cpu=True)
    check_processes(7, accelerator)
    environment.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match="2 processes were started and the accelerator has 1, so that each would train"
    ):
        check_processes(8, accelerator)
    check_processes(7, None)


def test_one_process_is_its_own_main(environment):
    accelerator, calls = make_accelerator(), []
    assert accelerator.num_processes == 1
    run_in_main(accelerator, lambda: calls.append(1))
    assert calls == [1]
    with pytest.raises(ZeroDivisionError):
        run_in_main(accelerator, lambda: 1 / 0)
    check_same_step(5, accelerator)
    check_same_step(5, None)
