"""A slice of what ``make fuzz-stores`` does: whole stores, changed as an attacker would, and used in every way."""

from __future__ import annotations

import os

import pytest

from tests.fuzz.power import CHECKS, Check, caught_by, without
from tests.fuzz.stores import CHANGES, check_store, main, watched

COUNT = int(os.environ.get("INCCKPT_FUZZ", "10000")) // 100


@pytest.mark.slow
def test_a_hostile_store_harms_no_reader() -> None:
    with watched():
        seen = {check_store(number) for number in range(COUNT)}
    assert len(seen) > len(set(CHANGES)) // 2


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fault(number: int) -> str:
        raise KeyError(f"of store {number}")

    monkeypatch.setattr("tests.fuzz.stores.check_store", fault)
    monkeypatch.setattr("tests.fuzz.stores.prepared", lambda: None)
    monkeypatch.setattr("resource.setrlimit", lambda *arguments: None)
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    monkeypatch.setattr("logging.disable", lambda *arguments: None)
    assert main(["--first", "7", "--count", "1"]) == 1
    assert "store 7 FAILED: KeyError" in capsys.readouterr().out


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.what)
def test_a_check_can_be_taken_out(check: Check) -> None:
    with without(check):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "what", ["a frame's digest", "the limit on packed values", "the limit on states", "JSON that Python refuses"]
)
def test_a_missing_check_is_noticed(what: str) -> None:
    """`python -m tests.fuzz.power` tries all of them."""
    [check] = [check for check in CHECKS if check.what == what]
    assert caught_by(check, 500) is not None, "no store shows that this check is missing"
