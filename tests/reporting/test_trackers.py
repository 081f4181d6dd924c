"""The example for trackers: what a save did arrives, through the calls that each tracker takes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import incckpt
from tests import programs

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "trackers.py"


@pytest.fixture(scope="module")
def trackers() -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("trackers", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorder:
    """Stands in for a tracker: takes the calls of the writers of three of them, and of no other."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.axes: dict[str, str | None] = {}
        self.runs: set[str] = set()

    def add_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        assert global_step is not None
        self.scalars.append((tag, scalar_value, global_step))

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes[name] = step_metric

    def log(self, data: dict[str, Any], step: int | None = None) -> None:
        assert step is None, "W&B drops what comes for a step that it has passed"
        at = data["checkpoint/step"]
        self.scalars += [(name, value, at) for name, value in data.items() if name != "checkpoint/step"]

    def log_metric(
        self, run_id: str, key: str, value: float, timestamp: int | None = None, step: int | None = None
    ) -> None:
        assert step is not None
        assert re.fullmatch(r"[\w./ -]+", key), "MLflow takes no other name"
        self.runs.add(run_id)
        self.scalars.append((key, value, step))


def save_three(store: Path, trackers: ModuleType, send: Callable[..., None]) -> list[incckpt.SaveReport]:
    state = {"model": {"w": torch.ones(1000), "v": torch.ones(10)}, "frozen": torch.ones(9)}
    with incckpt.CheckpointManager(store) as manager:
        for step in (1, 2, 3):
            state["model"]["w"] *= 1.5  # type: ignore[index]
            manager.save(step, state).add_done_callback(trackers.figures_to(send, manager))
        skipped = manager.save(3, state, if_exists="skip")
        manager.wait()
        before = len(manager.history)
        skipped.result()
        assert len(manager.history) == before
        return manager.history


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "mlflow"])
def test_each_tracker_gets_the_figures_of_each_save(tracker: str, trackers: ModuleType, tmp_path: Path) -> None:
    recorder = Recorder()
    send = {
        "tensorboard": lambda: trackers.to_tensorboard(recorder),
        "wandb": lambda: trackers.to_wandb(recorder),
        "mlflow": lambda: trackers.to_mlflow(recorder, "run 7"),
    }[tracker]()
    reports = save_three(tmp_path, trackers, send)
    for report in reports:
        sent = {
            name.removeprefix("checkpoint/"): value for name, value, step in recorder.scalars if step == report.step
        }
        assert sent["state_bytes"] == report.nbytes
        assert sent["stored_bytes"] == report.put_bytes + report.manifest_bytes
        assert sent["blocked_seconds"] == report.blocked_seconds
        moved = {name for name in sent if name.startswith("largest_relative_change/")}
        assert moved == (set() if report.step == 1 else {"largest_relative_change/model"})
        assert sent.get("largest_relative_change/model", 0.5) == pytest.approx(0.5, rel=1e-3)
    assert {step for _, _, step in recorder.scalars} == {1, 2, 3}
    if tracker == "wandb":
        assert recorder.axes == {"checkpoint/step": None, "checkpoint/*": "checkpoint/step"}
    assert recorder.runs == ({"run 7"} if tracker == "mlflow" else set())


def test_a_save_that_failed_sends_nothing(trackers: ModuleType, tmp_path: Path) -> None:
    recorder = Recorder()
    manager = incckpt.CheckpointManager(tmp_path / "store")
    manager.save(1, {"w": torch.ones(3)}).result()
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    future = manager.save(2, {"w": torch.zeros(3)})
    future.add_done_callback(trackers.figures_to(trackers.to_tensorboard(recorder), manager))
    with pytest.raises(incckpt.IncckptError):
        manager.close()
    assert future.exception() is not None
    assert recorder.scalars == []


@pytest.mark.slow
@pytest.mark.parametrize("tensorboard", [False, True], ids=["output", "tensorboard"])
def test_the_example_runs(tensorboard: bool, tmp_path: Path) -> None:
    options = ["--steps", "3"]
    if tensorboard:
        pytest.importorskip("tensorboard")
        options += ["--tensorboard", str(tmp_path / "logs")]
    done = programs.run(EXAMPLE, tmp_path / "store", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    if not tensorboard:
        assert [line.split()[:2] for line in done.stdout.splitlines()] == [["step", "1"], ["step", "2"], ["step", "3"]]
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("checkpoint/stored_bytes")] == [1, 2, 3]
    assert [event.step for event in events.Scalars("checkpoint/largest_relative_change/model")] == [2, 3]


def test_loggers_are_named_by_module() -> None:
    """Anything else would escape ``logging.getLogger("incckpt")``."""
    named = {
        argument
        for path in (ROOT / "incckpt").rglob("*.py")
        for argument in re.findall(r"getLogger\((.*?)\)", path.read_text())
    }
    assert named <= {"__name__", '"incckpt"'}
