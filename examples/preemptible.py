"""Training on a machine that may be taken away: saves once more when that is announced, and resumes elsewhere.

    python examples/preemptible.py s3://bucket/exp7

It ends with status 0 when it is done, and with 75 (EX_TEMPFAIL) when it was preempted, for a launcher to start it
again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress

import torch

import incckpt


def main() -> int:
    """Train, and return the status to end with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the store")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds from SIGTERM to SIGKILL")
    parser.add_argument("--clouds", nargs="*", default=[], help="auto, aws, gcp or azure")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, arguments.width), torch.nn.Tanh(), torch.nn.Linear(arguments.width, 64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    state = {"model": model, "optimizer": optimizer, "rng": incckpt.RngState()}

    preemption = incckpt.Preemption(grace=arguments.grace, clouds=arguments.clouds)
    manager = incckpt.CheckpointManager(arguments.url, keep_last_n=2, preemption=preemption)
    with suppress(incckpt.errors.DeadlineError), manager:  # it is logged, and the checkpoint before stands
        start = manager.restore(state) or 0
        for step in range(start + 1, arguments.steps + 1):
            inputs = torch.randn(32, 64)
            loss = (model(inputs) - inputs.sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"step {step} loss {loss.item():.9f}", flush=True)
            if step % arguments.every == 0 or step == arguments.steps or manager.preempted:
                manager.save(step, state, metrics={"loss": loss.item()})
            if manager.preempted:
                break
    if manager.preempted:
        os._exit(os.EX_TEMPFAIL)  # the interpreter takes seconds to end on a busy machine, and all is done
    return os.EX_OK


if __name__ == "__main__":
    sys.exit(main())
