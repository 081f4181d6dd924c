"""`export`, `import` and `recover`, as far as the command goes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

import incckpt
from tests.cli.conftest import Command


def test_export_and_import(command: Command, store: str, tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    done = command("export", f"{store}#@2", target, "--keys", "model.*")
    assert (done.code, done.err) == (0, "")
    assert torch.load(target)["model"]["bias"].tolist() == [2.0] * 9
    assert command("export", store, target).code == 2  # it exists
    done = command("import", target, f"{store}#imported@7", "--json")
    [one] = done.json["imported"]
    assert (one["checkpoint"]["run"], one["checkpoint"]["step"]) == ("imported", 7)
    assert incckpt.load(f"{store}#imported")["model"]["bias"].tolist() == [2.0] * 9
    assert command("import", store).code == 2


def test_recover(command: Command, store: str) -> None:
    assert "nothing to do" in command("recover", store).out
    shutil.rmtree(Path(store, "runs"))
    done = command("recover", store)
    assert (done.code, "--no-dry-run" in done.out) == (0, True)
    assert command("recover", store, "--no-dry-run", "--json").json["attempt"] is not None
    assert [one.step for one in incckpt.list_checkpoints(store, run="default")] == [1, 2, 3]
