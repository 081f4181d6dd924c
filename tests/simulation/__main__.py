"""Explore scenarios, and print what was explored of each and in all: ``python -m tests.simulation``.

Each scenario has the bounds that are its own. With ``--rules`` every rule is taken away in turn instead.
"""

from __future__ import annotations

import argparse
import sys

from incckpt.testing.exploration import Explored
from incckpt.testing.simulation import Violation
from tests.simulation.rules import RULES, without
from tests.simulation.scenarios import SCENARIOS
from tests.simulation.world import simulated

LIMIT = 200_000  # states of one scenario, far beyond what any has


def explore(only: str) -> int:
    """Explore scenarios; return how many were not explored whole."""
    total, cut, count = Explored(), 0, 0
    for name, scenario in SCENARIOS.items():
        if only not in name:
            continue
        explored = scenario.explore(limit=LIMIT)
        print(f"{name} {dict(scenario.bounds)}: {explored}", flush=True)
        total, cut, count = total + explored, cut + (not explored.complete), count + 1
    print(f"{count} scenarios, {cut} of them not completely: {total}; no promise broken")
    return cut


def take_away(only: str) -> int:
    """Take each rule away and explore the scenario that needs it; return how many were not missed."""
    missed = count = 0
    for name, rule in RULES.items():
        if only not in name:
            continue
        count += 1
        try:
            with without(name):
                SCENARIOS[rule.caught].explore(**{**rule.bounds, "limit": LIMIT})
        except Violation as violation:
            missed += 1
            print(f"without {name!r}: {str(violation).splitlines()[0]}", flush=True)
        else:
            print(f"without {name!r}: NOTHING", flush=True)
    print(f"{missed} of {count} rules caught")
    return count - missed


def main() -> int:
    """Explore what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of the names of scenarios or rules")
    parser.add_argument("--rules", action="store_true", help="take rules away")
    given = parser.parse_args()
    with simulated():
        return (take_away if given.rules else explore)(given.only)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
