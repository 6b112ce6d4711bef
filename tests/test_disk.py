"""Files that are whole or not there, folders that one process writes, and disks that are full."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import file_limit
from safetensors.torch import save_file

from diffusers_sae import InputError
from diffusers_sae.disk import append_to_log, cut_log, hold_folder, refuse_full_disk, write_whole

BIG = torch.zeros(5000)


def save_open(partial):
    with partial.open("wb") as file:
        torch.save(BIG, file)


WRITERS = {
    "text": lambda partial: partial.write_text("a" * 20_000),
    "safetensors": lambda partial: save_file({"a": BIG}, partial),
    "torch": save_open,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_is_written_whole_or_left_as_it_was(tmp_path, kind):
    file = tmp_path / "file"
    file.write_text("before")
    with file_limit(1000), pytest.raises(InputError, match=r"file cannot be written \(File too large\); make room and"):
        write_whole(file, WRITERS[kind])
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    write_whole(file, WRITERS[kind])
    assert file.stat().st_size >= 20_000 and list(tmp_path.iterdir()) == [file]


def test_other_errors_stay_what_they_are_and_leave_no_part(tmp_path):
    def write(partial):
        partial.write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())
    with pytest.raises(PermissionError), refuse_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_told_from_other_errors(tmp_path, number):
    with pytest.raises(InputError, match="cannot be written"), refuse_full_disk(tmp_path):
        raise OSError(number, "full")


def test_a_real_full_disk(tmp_path):
    """Where a small disk can be mounted."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for write in WRITERS.values():
            with pytest.raises(InputError, match=r"file cannot be written \(No space left on device\)"):
                write_whole(tmp_path / "file", write)
            assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_log_is_cut_where_the_checkpoint_was(tmp_path):
    log = tmp_path / "log.jsonl"
    cut_log(log, "step", 5)
    assert not log.exists()
    for step in (3, 5, 7):
        append_to_log(log, {"step": step, "fvu": 0.5})
    whole = log.read_text()
    log.write_bytes(log.read_bytes() + b'[1]\n"a"\n{"step": "5"}\n{"other": 1}\n\xff\xfe\n{"step": 4, "fv')
    cut_log(log, "step", 7)
    assert log.read_text() == whole
    cut_log(log, "step", 5)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [3, 5]
    with file_limit(10), pytest.raises(InputError, match="log.jsonl cannot be written"):
        append_to_log(log, {"step": 7})


HOLDER = "import sys, time, pathlib\nfrom diffusers_sae.disk import hold_folder\n"
HOLDER += "with hold_folder(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)\n"


def test_a_folder_is_written_by_one_process_and_a_kill_frees_it(tmp_path):
    folder = tmp_path / "a" / "b"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with (
                pytest.raises(InputError, match="Another process is writing .*; wait until it has ended"),
                hold_folder(folder),
            ):
                pass
        finally:
            os.kill(other.pid, signal.SIGKILL)
    with hold_folder(folder):
        assert not list(folder.iterdir())
    assert folder.exists()  # it was there before


def test_a_folder_that_stays_empty_is_removed_with_those_above_it(tmp_path):
    with hold_folder(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with hold_folder(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()
    with pytest.raises(ZeroDivisionError), hold_folder(tmp_path / "c"):
        raise ZeroDivisionError
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match="cannot be made .*; choose another folder"),
        hold_folder(tmp_path / "file" / "a"),
    ):
        pass
    with pytest.raises(InputError, match="cannot be made"), hold_folder(tmp_path / "file"):
        pass
