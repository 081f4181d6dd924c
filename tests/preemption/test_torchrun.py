"""Under torchrun: a worker that dies costs what was not durable, SIGTERM to the launcher costs nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

import incckpt
from tests.preemption.elastic import EVERY, batch, loss_of, made
from tests.programs import Program

pytestmark = pytest.mark.slow

STEPS, KILL_AT, TERM_AT = 5000, 23, 40
# Otherwise torch 2.13 keeps one store for all rounds, where gloo finds the addresses of those that died.
ENVIRONMENT = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
WORKER = Path(__file__).with_name("elastic.py")


def undisturbed(steps: int) -> tuple[dict[int, str], torch.nn.Module]:
    """Return the losses of rank 0 and the model in the end, from both ranks' gradients in one process."""
    model, optimizer = made()
    losses = {}
    for step in range(1, steps + 1):
        loss = loss_of(model, batch(0, step))
        optimizer.zero_grad()
        (loss + loss_of(model, batch(1, step))).backward()
        optimizer.step()
        losses[step] = str(loss.item())
    return losses, model


def launched(store: Path) -> tuple[int, list[tuple[int, str]]]:
    """Run two workers, of which one dies once; stop the launcher when they are well on again.

    Returns
    -------
    int, list of (int, str)
        The launcher's status, and the steps of rank 0 with their losses, as they came.
    """
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(WORKER), str(store), str(STEPS), str(KILL_AT)]
    steps: list[tuple[int, str]] = []
    stopped = False
    reading, writing = os.pipe()
    with open(reading) as printed, open(writing, "w") as output, open(os.devnull, "w") as errors:
        launcher = Program(*command, output=output, error=errors, environment=ENVIRONMENT)
        output.close()
        for line in printed:
            _, step, _, loss = line.split()
            steps.append((int(step), loss))
            if int(step) >= TERM_AT and not stopped:
                launcher.send_signal(signal.SIGTERM)
                stopped = True
        return launcher.wait(), steps


def test_a_worker_dies_and_the_launcher_is_stopped(tmp_path: Path) -> None:
    status, steps = launched(tmp_path)
    assert status != 0
    again = next(index for index, (step, _) in enumerate(steps) if index and step != steps[index - 1][0] + 1)
    died_at, went_on_at = steps[again - 1][0], steps[again][0]
    assert died_at == KILL_AT - 1
    assert went_on_at % EVERY == 1, "the workers did not start again from a checkpoint"
    assert died_at - went_on_at < EVERY, "a save that was pending when the worker died was not made"
    last = steps[-1][0]
    assert TERM_AT <= last < STEPS
    assert incckpt.list_checkpoints(tmp_path)[-1].step == last, "the launcher's SIGTERM cost steps"
    losses, model = undisturbed(last)
    assert [(step, loss) for step, loss in steps if losses[step] != loss] == []
    saved = incckpt.load(tmp_path)["model"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
