"""Trainings killed at random, and resumed by URL in an empty folder, until enough kills are done.

``python -m tests.integrations.kills transformers --kills 20``. Each ends with the weights of an uninterrupted training
by the framework itself, bit for bit. What trains is the function ``train`` of ``tests.integrations.train_<framework>``,
which has several ``KINDS`` of training.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import random
import signal
import tempfile
import time
from pathlib import Path
from types import ModuleType

import torch

CONTEXT = multiprocessing.get_context("forkserver")


class Failed(Exception):
    """A training did not do what it should; its output says more."""


class Training:
    """A training in a process of its own; it has begun once this is made, and `began` is its first step."""

    def __init__(self, module: ModuleType, kind: str, url: Path, folder: Path, result: Path, *, plain: bool) -> None:
        here, there = CONTEXT.Pipe(duplex=False)
        self._process = CONTEXT.Process(target=module.train, args=(kind, str(url), folder, result, plain, there.send))
        self._process.start()
        there.close()
        try:
            self.began: int = here.recv()
        except EOFError:
            self.finish()
            raise Failed(f"{kind}: the training did not begin") from None

    def killed_after(self, seconds: float) -> bool:
        """Kill it after so long; return whether it was still under way."""
        self._process.join(seconds)
        self._process.kill()
        self._process.join()
        if self._process.exitcode != -signal.SIGKILL:
            self.finish()  # it had ended before
            return False
        return True

    def finish(self) -> None:
        """Wait for its end."""
        self._process.join()
        if self._process.exitcode != 0:
            raise Failed(f"a training ended with status {self._process.exitcode}")


def equal(one: Path, other: Path) -> bool:
    """Whether two files hold the same weights, bit for bit."""
    ours, theirs = torch.load(one), torch.load(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def kill_kind(module: ModuleType, kind: str, kills: int, generator: random.Random, work: Path) -> None:
    """Kill one kind of training `kills` times."""
    began = time.monotonic()
    reference = work / "reference.pt"
    plain = Training(module, kind, work / "none", work / "plain", reference, plain=True)
    training = time.monotonic()
    plain.finish()
    longest = time.monotonic() - training
    done = finished = 0
    resumed: set[int] = set()
    while done < kills or finished == 0:
        url, result = work / f"store{finished}", work / f"result{finished}.pt"
        for attempt in range(10 * kills + 10):
            one = Training(module, kind, url, work / f"folder{finished}-{attempt}", result, plain=False)
            resumed.add(one.began)
            if done < kills and one.killed_after(generator.uniform(0, longest / 2)):
                done += 1
                continue
            one.finish()
            break
        if not equal(result, reference):
            raise Failed(f"{kind}: training {finished} ended with other weights")
        finished += 1
    print(
        f"{kind}: {done} kills, resumed from steps {sorted(resumed)}, {finished} trainings ended, all with the weights "
        f"of the uninterrupted one ({time.monotonic() - began:.0f} s)",
        flush=True,
    )


def main() -> None:
    """Kill every kind of training of a framework."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework")
    parser.add_argument("--kinds", nargs="*", help="all of the framework's by default")
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    name = f"tests.integrations.train_{options.framework}"
    CONTEXT.set_forkserver_preload([name])  # frameworks take long to import: once
    module = importlib.import_module(name)
    for kind in options.kinds or module.KINDS:
        with tempfile.TemporaryDirectory() as work:
            kill_kind(module, kind, options.kills, random.Random(options.seed), Path(work))


if __name__ == "__main__":
    main()
