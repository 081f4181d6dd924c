"""Training on a machine that may be taken away: saves once more when that is announced, and resumes elsewhere.

    python examples/preemptible.py s3://bucket/exp7 --clouds auto

It ends with status 0 when it is done, and with 75 (EX_TEMPFAIL) when it was preempted, for a launcher to start it
again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from concurrent.futures import Future
from contextlib import suppress

import torch

import incckpt


def options() -> argparse.ArgumentParser:
    """Return what can be given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of the store")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--clouds", nargs="*", default=[], help="auto, aws, gcp or azure")
    return parser


def train(given: argparse.Namespace, preemption: incckpt.Preemption) -> int:
    """Train, and return the status to end with."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, given.width), torch.nn.Tanh(), torch.nn.Linear(given.width, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer, "rng": incckpt.RngState()}

    manager = incckpt.CheckpointManager(given.url, keep_last_n=2, preemption=preemption)
    with suppress(incckpt.errors.DeadlineError), manager:  # it is logged, and the checkpoint before stands
        start = manager.restore(state) or 0
        for step in range(start + 1, given.steps + 1):
            inputs = torch.randn(8, 64)
            loss = (model(inputs) - inputs.sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step} loss {loss.item()}", flush=True)
            if step % given.every == 0 or step == given.steps or manager.preempted:
                manager.save(step, state, metrics={"loss": loss.item()}).add_done_callback(announce)
            if manager.preempted:
                break
    return os.EX_TEMPFAIL if manager.preempted else os.EX_OK


def announce(save: Future[incckpt.Checkpoint]) -> None:
    """Say that a checkpoint is durable."""
    if save.exception() is None:
        logging.info("step %d is durable", save.result().step)


def main() -> None:
    """Train, and end the process."""
    given = options().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    status = train(given, incckpt.Preemption(grace=given.grace, clouds=given.clouds))
    if status == os.EX_TEMPFAIL:
        os._exit(status)  # the interpreter takes seconds to end on a busy machine, and all is done
    sys.exit(status)


if __name__ == "__main__":
    main()
