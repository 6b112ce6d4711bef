"""How commands fail: one sentence, an exit code, and what to do after a stop."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from diffusers_sae import InputError, cli
from diffusers_sae.cli import prompts, sources
from diffusers_sae.cli.failures import advise_after_stop, explain


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("Wrong."), 2, "Wrong."),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), 2, "pip install 'diffusers_sae[evaluate]'"),
        (ModuleNotFoundError("No module named 'odd'", name="odd.part"), 2, "run: pip install odd."),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out cannot be read or written (Permission"),
        (OSError(errno.ENOSPC, "No space left on device", "out"), 2, "the disk is full; make room"),
        (MemoryError("too much"), 2, "too little memory (too much); lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "too little memory (CUDA out of memory. Tried)"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "too little memory"),
        (ZeroDivisionError("division by zero"), 70, "ZeroDivisionError: division by zero; run with --debug for"),
        (KeyError(), 70, "KeyError: no message; run with --debug"),
        (OSError("without a number"), 70, "OSError: without a number; run with --debug"),
    ],
)
def test_every_error_becomes_a_sentence(error, code, sentence):
    told, exit_code = explain(error)
    assert exit_code == code and sentence in told and "\n" not in told


def failing(error):
    def read(file, column):
        raise error

    return read


CAPTURE = ("capture", "emoji-sd", "p.txt", "--site", "unet.mid_block", "--out", "store")


@pytest.fixture
def prompt_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n")
    return tmp_path


def test_what_nobody_foresaw_has_a_code_of_its_own(command, monkeypatch, prompt_file):
    monkeypatch.setattr("diffusers_sae.cli.capture.read_prompts", failing(ZeroDivisionError("division by zero")))
    outcome = command(*CAPTURE)
    assert outcome.code == 70
    assert outcome.err == "error: ZeroDivisionError: division by zero; run with --debug for the traceback.\n"
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", *CAPTURE, "--debug"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_how_to_go_on(command, monkeypatch, prompt_file, number, code):
    before = signal.getsignal(number)

    def stop(file, column):
        os.kill(os.getpid(), number)
        return prompts.read_prompts(file, column)  # never reached: the signal comes first

    monkeypatch.setattr("diffusers_sae.cli.capture.read_prompts", stop)
    outcome = command(*CAPTURE, "--call", '{"num_inference_steps": 4}')
    assert outcome.code == code and outcome.out == ""
    assert outcome.err == (
        "\nStopped; to go on with what was finished, repeat: "
        "diffusers-sae capture emoji-sd p.txt --site unet.mid_block --out store --call '{\"num_inference_steps\": 4}'\n"
    )
    assert signal.getsignal(number) == before and not (prompt_file / "store").exists()


STOPPED_BY_AN_IMPORT = """
import os, signal, sys
sys.argv = ["diffusers-sae", "check", "emoji-sd", "sae"]

class Stopper:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {stop}

sys.meta_path.insert(0, Stopper())
from diffusers_sae.cli import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "torch", "diffusers"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_stop_during_the_imports_is_a_sentence(tmp_path, module, turned):
    """Also where a library turns what it catches into an error of its own."""
    stop = "os.kill(os.getpid(), signal.SIGINT)"
    if turned:
        stop = f"try: {stop}\n            except BaseException: raise RuntimeError('import failed')"
    outcome = subprocess.run(
        [sys.executable, "-c", STOPPED_BY_AN_IMPORT.format(module=module, stop=stop)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert outcome.returncode == 130 and outcome.stdout == ""
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("Stopped; nothing was kept, and") and last.endswith(": diffusers-sae check emoji-sd sae")
    assert "Traceback" not in outcome.stderr


def test_a_stop_before_the_handlers_is_a_sentence(command, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(signal, "signal", interrupted)
    outcome = command("check", "emoji-sd", "sae")
    assert outcome.code == 130 and "nothing was kept" in outcome.err


def test_a_command_that_cannot_go_on_says_so(command, monkeypatch, tmp_path):
    def stop(name):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(sources, "load_model", stop)
    monkeypatch.setattr("diffusers_sae.cli.check.load_model", stop)
    outcome = command("check", "emoji-sd", "sae")
    assert outcome.code == 130
    assert "nothing was kept, and the command begins anew when it is repeated: diffusers-sae check" in outcome.err


def test_several_processes_are_started_again():
    assert "start the same processes again" in advise_after_stop(["train", "store"], "diffusers-sae", 2)
    told = advise_after_stop(["train", "a store"], "python -m diffusers_sae.cli", 1)
    assert told.endswith("repeat: python -m diffusers_sae.cli train 'a store'")


@pytest.mark.parametrize(
    ("module", "arguments", "extra"),
    [
        ("matplotlib", ("inspect", "."), "demo"),
        ("matplotlib", ("demo", "--out", "out"), "demo"),
        ("matplotlib", ("evaluate", "--parts", "curves", "--out", "out/f.json", "--work", "out"), "evaluate|demo"),
        ("scipy", ("evaluate", "--parts", "model", "--out", "out/f.json", "--work", "out"), "evaluate"),
    ],
)
def test_a_missing_package_is_found_before_the_work(command, monkeypatch, tmp_path, module, arguments, extra):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    outcome = command(*arguments)
    assert outcome.code == 2 and f"This command needs {module}, which cannot be imported" in outcome.err
    assert any(f"diffusers_sae[{name}]" in outcome.err for name in extra.split("|"))
    assert list(tmp_path.iterdir()) == []
