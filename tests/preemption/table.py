"""The preemptions of some runs as tables: what became of each kind, and how good the estimates were."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["failures", "tables"]

_ANSWERS = (("fits", True), ("does not fit", False))

Row = dict[str, Any]  # `Life.to_json`, with `run`, and what the process after it showed: `lost`, `resumed`


def failures(rows: Sequence[Row]) -> list[Row]:
    """Return those that ended late, were not resumed from what was announced, or trained otherwise."""
    return [row for row in rows if row["left"] < 0 or row["resumed"] is False or row["wrong"]]


def tables(rows: Sequence[Row]) -> str:
    """Return tables in Markdown."""
    kinds = [("SIGTERM", ["SIGTERM"]), ("notice of AWS", ["aws"]), ("notice of GCP", ["gcp"])]
    kinds += [("notice of Azure", ["azure"]), ("all", ["SIGTERM", "aws", "gcp", "azure"])]
    lines = [
        "| | preemptions | ended late | least time left | resumed from the newest announced | steps lost: none, "
        "median, most | losses bit-identical |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, some in kinds:
        lines.append(_became(name, [row for row in rows if row["plan"]["kind"] in some]))
    lines += ["", "| expected | times | saved in time | given up |", "| --- | --- | --- | --- |"]
    told = [row for row in rows if row["forecast"] is not None]
    own, another = "by its own saves", "by another process's"
    groups = [(f"{name}, {by}", fits, by == another) for by in (own, another) for name, fits in _ANSWERS]
    for name, fits, carried_over in [*groups, ("not known", None, False)]:
        some_told = [row for row in told if _fits(row) is fits and row["carried_over"] is carried_over]
        saved = sum(row["took"] is not None for row in some_told)
        lines.append(f"| {name} | {len(some_told)} | {saved} | {len(some_told) - saved} |")
    by = [[row for row in told if row["carried_over"] is carried_over] for carried_over in (False, True)]
    return "\n".join([*lines, "", f"{own}: {_ratios(by[0])}", f"{another}: {_ratios(by[1])}"])


def _became(name: str, rows: Sequence[Row]) -> str:
    if not rows:
        return f"| {name} | 0 | | | | | |"
    lost = [row["lost"] for row in rows if row["lost"] is not None]
    resumed = [row["resumed"] for row in rows if row["resumed"] is not None]
    wrong = sum(bool(row["wrong"]) for row in rows)
    steps = f"{lost.count(0)}, {statistics.median(lost):.0f}, {max(lost)}" if lost else ""
    return (
        f"| {name} | {len(rows)} | {sum(row['left'] < 0 for row in rows)} | {min(row['left'] for row in rows):.1f} s "
        f"| {sum(resumed)} of {len(resumed)} | {steps} | {f'{wrong} not' if wrong else 'all'} |"
    )


def _fits(row: Row) -> bool | None:
    left, expected = row["forecast"]
    return None if expected is None else bool(expected <= left)


def _ratios(rows: Iterable[Row]) -> str:
    both = [(row["took"], row["forecast"][1]) for row in rows if row["took"] is not None and row["forecast"][1]]
    if not both:
        return "No save was made of which anything was known."
    ratios = sorted(took / expected for took, expected in both)
    return (
        f"Saves with an estimate took {statistics.median(ratios):.2f} of it (median; {ratios[len(ratios) // 10]:.2f} "
        f"to {ratios[-1 - len(ratios) // 10]:.2f} without the tenth at either end, {ratios[-1]:.2f} at most)."
    )
