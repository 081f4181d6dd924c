"""ckpt-chaos over the adapters: a training killed at every file event of a save, and resumed.

``python -m tests.integrations.chaos`` runs the matrices of ``ckpt-chaos bench`` for the `Trainer` and Lightning, each
with its own checkpoints and with incckpt's, which ckpt-chaos sees because the store makes its system calls from Python.
It prints a table, and fails if a point of ours is no PASS. A plan "drifts" whenever a file's name holds a nonce.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt_chaos import runner

import incckpt

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Matrix:
    """A training to kill.

    Attributes
    ----------
    what, target
        For the table, and for ckpt-chaos.
    ours
        Whether incckpt saves it, so that every point has to pass.
    strategy
        How it is resumed.
    """

    what: str
    target: str
    ours: bool
    strategy: str = "direct"


MATRICES = {
    "trainer": Matrix("`Trainer`", "hf_trainer", ours=False),
    "trainer-incckpt": Matrix("`Trainer` with incckpt", "incckpt_trainer", ours=True),
    "lightning": Matrix('Lightning, `ckpt_path="last"`', "lightning_trainer", ours=False),
    "lightning-incckpt": Matrix(
        "Lightning with incckpt, `ckpt_path=checkpoints.latest`", "incckpt_lightning", True, "latest"
    ),
    "lightning-incckpt-last": Matrix('Lightning with incckpt, `ckpt_path="last"`', "incckpt_lightning", True, "last"),
}


def newest(out: Path, _: object) -> int:
    """Return the newest step that the store in a folder has, before anything is resumed."""
    return max((checkpoint.step for checkpoint in incckpt.list_checkpoints(out / "store")), default=0)


def main() -> int:
    """Run matrices; return whether a point of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("matrices", nargs="*", choices=[[], *MATRICES], help="all by default")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="a new folder")
    options = parser.parse_args()
    os.environ["CKPT_CHAOS_PREPEND_PYTHONPATH"] = str(ROOT)
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
        failed |= matrix.ours and verdicts["PASS"] < len(rows)
    print("\n".join(table))
    return failed


if __name__ == "__main__":
    sys.exit(main())
