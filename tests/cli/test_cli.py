"""The command line: what it does with mistakes."""

import sys

import pytest

from diffusers_sae import cli


def run(monkeypatch, capsys, *arguments):
    """Exit code and what stands on standard error."""
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert stop.value.code in (0, None)
    assert "demo" in shown and "evaluate" in shown


def test_a_mistake_is_one_sentence(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, "evaluate", "--parts", "model,luck")
    assert code == 2
    assert shown == "error: 'luck' is not a part; choose from model, sae, steering, bare, curves, styles, objects.\n"


def test_debug_shows_where_it_arose(monkeypatch):
    from diffusers_sae import InputError

    monkeypatch.setattr(sys, "argv", ["diffusers-sae", "evaluate", "--parts", "luck", "--debug"])
    with pytest.raises(InputError, match="'luck' is not a part"):
        cli.main()


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, "dream")
    assert code == 2
    assert "dream" in shown and "Traceback" not in shown
