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
