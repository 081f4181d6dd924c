"""Send what each save did to TensorBoard, Weights & Biases or MLflow; without one of them, to standard output.

    python examples/trackers.py checkpoints                       # or s3://bucket/gpt
    python examples/trackers.py checkpoints --tensorboard logs    # needs the package tensorboard

A save returns a future, and a future takes callbacks: `figures_to` makes one. It runs in the background, once the
checkpoint is durable, so training does not wait for the tracker.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeAlias

import torch
from torch import nn

import incckpt

Send: TypeAlias = Callable[[Mapping[str, float], int], None]
"""Takes figures by name, and the step that they are of."""


def figures_to(send: Send, manager: incckpt.CheckpointManager) -> Callable[[Future[incckpt.Checkpoint]], None]:
    """Return a callback for the futures of `manager.save`."""

    def saved(future: Future[incckpt.Checkpoint]) -> None:
        if future.exception() is None:  # else the manager's next call raises it
            step = future.result().step
            # A save that was skipped, since the step was there, has no report.
            for report in manager.history:
                if report.step == step:
                    send(figures(report), step)

    return saved


def figures(report: incckpt.SaveReport) -> dict[str, float]:
    """Return what is worth a chart: bytes, seconds, and how far the parts of the state moved."""
    found = {
        "checkpoint/state_bytes": float(report.nbytes),
        "checkpoint/changed_bytes": float(report.changed_bytes),
        "checkpoint/stored_bytes": float(report.put_bytes + report.manifest_bytes),
        "checkpoint/blocked_seconds": report.blocked_seconds,
        "checkpoint/background_seconds": report.seconds["store"] + report.seconds["commit"],
    }
    for name, (relative, _) in report.norms.items():
        part = f"checkpoint/largest_relative_change/{name.partition('.')[0]}"
        found[part] = max(found.get(part, 0.0), relative)
    return found


def to_tensorboard(writer: Any) -> Send:
    """Send to a ``torch.utils.tensorboard.SummaryWriter``."""

    def send(found: Mapping[str, float], step: int) -> None:
        for name, value in found.items():
            writer.add_scalar(name, value, step)

    return send


def to_wandb(run: Any) -> Send:
    """Send to what ``wandb.init()`` returns.

    W&B drops what is logged for a step that it has passed, and a save ends when training is further on: so these
    figures have an axis of their own.
    """
    run.define_metric("checkpoint/step")
    run.define_metric("checkpoint/*", step_metric="checkpoint/step")
    return lambda found, step: run.log({**found, "checkpoint/step": step})


def to_mlflow(client: Any, run_id: str) -> Send:
    """Send to an ``mlflow.MlflowClient``: in a background thread, MLflow does not know the active run."""

    def send(found: Mapping[str, float], step: int) -> None:
        for name, value in found.items():
            client.log_metric(run_id, name, value, step=step)

    return send


def to_output(found: Mapping[str, float], step: int) -> None:
    """Print."""
    print(f"step {step}", *(f"{name.removeprefix('checkpoint/')}={value:.4g}" for name, value in found.items()))


def main() -> None:
    """Train a little, with a save at every step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="where the checkpoints are: a folder or a URL")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tensorboard", metavar="FOLDER", help="write there for TensorBoard")
    options = parser.parse_args()

    send: Send = to_output
    writer = None
    if options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(options.tensorboard)
        send = to_tensorboard(writer)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    app = {"model": model, "optimizer": optimizer}
    with incckpt.CheckpointManager(options.store) as manager:
        start = manager.restore(app) or 0
        for step in range(start + 1, start + options.steps + 1):
            x = torch.randn(32, 64)
            loss = (model(x) - x).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            future = manager.save(step, app, metrics={"loss": loss.item()})
            future.add_done_callback(figures_to(send, manager))
    if writer is not None:
        writer.close()


if __name__ == "__main__":
    main()
