"""What the doctor finds, on stores that are made ill."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import s3fs

import incckpt
from incckpt.backends.local import LocalBackend
from incckpt.backends.memory import MemoryBackend
from incckpt.errors import BackendPermissionError
from incckpt.testing.faults import Fail, Fault, FaultyBackend


def statuses(found: incckpt.Diagnosis) -> dict[str, str]:
    return {finding.check: finding.status for finding in found.findings}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    incckpt.save({"x": 1}, tmp_path / "store")
    return tmp_path / "store"


def test_a_store_in_good_health_is_left_as_it_was(store: Path) -> None:
    before = {path for path in store.rglob("*") if path.is_file()}
    found = incckpt.diagnose(store)
    assert set(statuses(found).values()) == {"ok"}
    assert {path for path in store.rglob("*") if path.is_file()} == before
    assert found
    assert found.save_requests["create"] == 1
    assert found.save_seconds is not None


def test_no_store_yet(tmp_path: Path) -> None:
    found = incckpt.diagnose(tmp_path / "none")
    assert (bool(found), statuses(found)["writing"]) == (True, "skipped")
    assert not (tmp_path / "none").exists()


def test_reading_only(store: Path) -> None:
    found = incckpt.diagnose(store, write=False)
    assert statuses(found) == {"reading": "ok", "store": "ok", "writing": "skipped", "leftovers": "ok"}
    assert found.save_seconds is None


@pytest.mark.parametrize(("operation", "check"), [("list", "reading"), ("create", "writing"), ("delete", "writing")])
def test_without_rights(store: Path, operation: str, check: str) -> None:
    refusal = Fault(operation, times=None, do=Fail(BackendPermissionError(f"no {operation}")))
    found = incckpt.diagnose(FaultyBackend(LocalBackend(store), [refusal]))
    assert not found
    [failed] = [finding for finding in found.findings if finding.status == "failed"]
    assert (failed.check, failed.message) == (check, f"no {operation}")


def test_a_store_without_exclusive_creation(store: Path) -> None:
    backend = MemoryBackend(str(uuid.uuid4()))
    incckpt.CheckpointManager(backend).save(1, {"x": 1}).result()
    backend.exclusive = False
    found = incckpt.diagnose(backend)
    assert (bool(found), statuses(found)["exclusive creation"]) == (True, "warning")


def test_leftovers_of_the_dead(store: Path) -> None:
    old = time.time() - 7200
    for name in ("probe/" + "0" * 32, "gc/" + "0" * 16 + ".condemned", f"pins/default/000001-{'0' * 12}-{'1' * 16}"):
        path = store / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}")
        os.utime(path, (old, old))
    [finding] = [finding for finding in incckpt.diagnose(store).findings if finding.check == "leftovers"]
    assert finding.status == "warning"
    assert all(part in finding.message for part in ("1 probes", "1 saves", "1 lists", "incckpt gc"))


def test_a_damaged_marker(store: Path) -> None:
    (store / "incckpt.json").write_text("{}")
    found = incckpt.diagnose(store)
    assert (bool(found), statuses(found)["store"]) == (False, "failed")


def test_s3(s3_server: dict[str, Any]) -> None:
    s3fs.S3FileSystem(**s3_server).makedirs("doctor", exist_ok=True)
    found = incckpt.diagnose(f"s3://doctor/{uuid.uuid4()}", storage_options=s3_server)
    assert set(statuses(found).values()) == {"ok"}
    found = incckpt.diagnose(f"s3://no-such-bucket-{uuid.uuid4()}/x", storage_options=s3_server)
    assert [(finding.check, finding.status) for finding in found.findings] == [("reading", "failed")]
    assert "bucket" in found.findings[0].message
