"""Prints the table: ``python -m tests.peers [PATTERN]``."""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from tests.peers import metrics, modules, optimizers, quantizers, schedules, weights
from tests.peers.protocol import Case, Row, try_case


def all_cases() -> Iterator[Case]:
    """Yield every object there is to try."""
    yield from optimizers.torch_optimizers()
    yield from optimizers.third_party_optimizers()
    yield from schedules.schedules()
    yield from schedules.scalers()
    yield from schedules.averages()
    yield from modules.modules()
    yield from modules.own_loading()
    yield from metrics.metrics()
    yield from quantizers.quantizers()


def rows(pattern: str, cache: Path) -> Iterator[Row]:
    """Try what `pattern` names, one after the other."""
    for case in all_cases():
        if fnmatch.fnmatch(f"{case.group} {case.name}", pattern):
            yield try_case(case)
    if not fnmatch.fnmatch("weight files", pattern):
        return
    for found in weights.files(cache):
        yield found if isinstance(found, Row) else weights.try_file(*found)


def main() -> int:
    """Print a row for each object that was asked for, and the sums."""
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("pattern", nargs="?", default="*", help="of 'group name', with * and ?; everything if left out")
    parser.add_argument(
        "--failures", action="store_true", help="print only rows in which incckpt did worse, or that could not be tried"
    )
    parser.add_argument("--cache", type=Path, default=Path(".bench/wheels"), help="where downloaded wheels are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    verdicts: dict[str, Counter[str]] = {}
    for row in rows(options.pattern, options.cache):
        verdicts.setdefault(row.group, Counter())[row.verdict] += 1
        if not options.failures or row.verdict in ("WORSE", "void"):
            show(row)
    print(f"\n{'':18} {'rows':>5}  verdicts")
    for group, counts in verdicts.items():
        sums = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        print(f"{group:18} {counts.total():5}  {sums}")
    failed = sum(counts["WORSE"] for counts in verdicts.values())
    print(f"{failed} rows in which incckpt did worse than the hand; {time.monotonic() - start:.0f} s")
    return 1 if failed or not verdicts else 0


def show(row: Row) -> None:
    """Print a row."""
    outcomes = f"by hand {row.by_hand[:200]:10} | incckpt {row.through_incckpt[:300]}"
    print(f"{row.verdict:6} {row.group:18} {row.name:60} {outcomes}", flush=True)
    for message in dict.fromkeys(row.warned):
        print(f"       warned: {message[:250]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
