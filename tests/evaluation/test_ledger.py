"""The ledger computes nothing twice, survives a kill, and never mixes settings."""

import pytest

from diffusers_sae import InputError
from diffusers_sae.evaluation.ledger import Ledger


def test_results_are_computed_once_and_kept(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, {"seed": 1})
    assert first.get("a", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    again = Ledger(path, {"seed": 1})
    assert "a" in again and "b" not in again
    assert again.get("a", lambda: pytest.fail("computed twice")) == {"x": [1, 2]}


def test_a_line_cut_by_a_kill_is_computed_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, {})
    ledger.get("a", lambda: 1)
    ledger.get("b", lambda: 2)
    path.write_text(path.read_text()[:-4])
    again = Ledger(path, {})
    assert again.get("a", lambda: 9) == 1
    assert again.get("b", lambda: 3) == 3
    assert Ledger(path, {}).get("b", lambda: 9) == 3


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"seed": 1}).get("a", lambda: 1)
    before = path.read_text()
    with pytest.raises(InputError, match="other settings"):
        Ledger(path, {"seed": 2})
    assert path.read_text() == before


@pytest.mark.parametrize("data", [b"garbage\n", b"[1]\n", b"\xff\xfe\xe9", b'{"other": 1}\n'])
def test_another_file_is_not_written_over(tmp_path, data):
    (tmp_path / "ledger.jsonl").write_bytes(data)
    with pytest.raises(InputError, match="is no record of an evaluation"):
        Ledger(tmp_path / "ledger.jsonl", {"a": 1})
    assert (tmp_path / "ledger.jsonl").read_bytes() == data


@pytest.mark.parametrize("size", [0, 5, 16])
def test_a_record_that_was_cut_off_at_its_beginning_begins_anew(tmp_path, size):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"a": 1})
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert Ledger(path, {"a": 1}).get("x", lambda: 3) == 3
    assert path.read_bytes().startswith(whole)


def test_a_line_of_something_else_is_dropped(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, {"a": 1}).get("x", lambda: 3)
    with path.open("ab") as file:
        file.write(b'[1]\n"text"\n\xff\xfe\n{"key": "y"}\n')
    assert "x" in Ledger(path, {"a": 1}) and path.read_text().count("\n") == 2
