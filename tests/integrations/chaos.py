"""ckpt-chaos over the adapters: a training killed at every file event of a save, and resumed.

``python -m tests.integrations.chaos`` runs the matrices of ``ckpt-chaos bench`` for the `Trainer` and Lightning, each
with its own checkpoints and with incckpt's, which ckpt-chaos sees because the store makes its system calls from Python.
It prints a table, and fails if a point that has to is no PASS. A plan "drifts" whenever a file's name holds a nonce.

Every phase runs in a process of its own, as ckpt-chaos starts it, except that it is forked from one that has imported
the frameworks: that takes longer than the training.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import runpy
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_chaos import runner

import incckpt

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["lightning.pytorch", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"]


@dataclass(frozen=True)
class Matrix:
    """A training to kill.

    Attributes
    ----------
    what, target
        For the table, and for ckpt-chaos.
    strict
        Whether every point has to pass.
    strategy
        How it is resumed.
    """

    what: str
    target: str
    strict: bool
    strategy: str = "direct"


MATRICES = {
    "trainer": Matrix("`Trainer`", "hf_trainer", strict=False),
    "trainer-incckpt": Matrix("`Trainer` with incckpt", "incckpt_trainer", strict=True),
    "lightning": Matrix('Lightning, `ckpt_path="last"`', "lightning_trainer", strict=False),
    "lightning-incckpt": Matrix(
        "Lightning with incckpt, `ckpt_path=checkpoints.latest`", "incckpt_lightning", True, "latest"
    ),
    "lightning-incckpt-last": Matrix('Lightning with incckpt, `ckpt_path="last"`', "incckpt_lightning", False, "last"),
}


def newest(out: Path, _: object) -> int:
    """Return the newest step that the store in a folder has, before anything is resumed."""
    return max((checkpoint.step for checkpoint in incckpt.list_checkpoints(out / "store")), default=0)


def launch(target: str, phase: str, out: Path, extra: Any = None, ranks: int = 1, timeout: int = 240) -> int:
    """Run a phase of a target in `ranks` processes, as ckpt-chaos' own does; return the first status that is not 0."""
    out.parent.mkdir(parents=True, exist_ok=True)
    port = runner._free_port()
    processes = []
    for rank in range(ranks):
        environment = runner._env(extra)
        if ranks > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "ckpt-chaos"}
        log = out.parent / f"{phase}_rank{rank}.log"
        process = CONTEXT.Process(target=run_phase, args=(runner.TARGETS[target], phase, out, environment, log))
        process.start()
        processes.append(process)
    for process in processes:
        process.join(timeout)
        if process.exitcode != 0:  # the others miss it
            timeout = runner.PEER_GRACE_S
    for process in processes:
        process.kill()
        process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def run_phase(module: str, phase: str, out: Path, environment: dict[str, str], log: Path) -> None:
    """Run a target's module as a command."""
    os.environ.update(environment)
    sys.argv = [module, phase, "--out", str(out)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    runpy.run_module(module, run_name="__main__")


def main() -> int:
    """Run matrices; return whether a point failed that has to pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("matrices", nargs="*", choices=[[], *MATRICES], help="all by default")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    CONTEXT.set_forkserver_preload(PRELOADED)
    runner._launch = launch
    runner.TARGETS["incckpt_trainer"] = "tests.integrations.chaos_trainer"
    runner.TARGETS["incckpt_lightning"] = "tests.integrations.chaos_lightning"
    runner.NEWEST["incckpt_trainer"] = runner.NEWEST["incckpt_lightning"] = newest
    table = ["| | points | PASS | HARD_FAIL | SILENT_DIVERGENCE | LOST_WORK |", "| --- | --- | --- | --- | --- | --- |"]
    failed = False
    for name in options.matrices or MATRICES:
        matrix = MATRICES[name]
        work = (options.work / f"{name}-{options.ranks}").resolve()
        rows: list[Any] = runner.run_matrix(work, options.jobs, options.ranks, matrix.target, matrix.strategy)
        runner.print_table(rows)
        verdicts = Counter(row.verdict for row in rows)
        cells = (verdicts[each] for each in ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK"))
        table.append(f"| {matrix.what} | {len(rows)} | " + " | ".join(map(str, cells)) + " |")
        failed |= matrix.strict and verdicts["PASS"] < len(rows)
    print("\n".join(table))
    return failed


if __name__ == "__main__":
    sys.exit(main())
