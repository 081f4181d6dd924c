"""The protocol, proved wrong where it can be: the store's own code, every order of requests, each rule taken away.

By default every scenario is explored whole, with the bounds that are its own. INCCKPT_SIMULATION=1 adds larger bounds,
up to a number of states, and makes the stories ten times as long (2: twenty times, and so on). Stories are
drawn from a seed and not by Hypothesis, whose shrinking needs programs that can be cut; what fails is told by its seed.

    INCCKPT_SIMULATION=1 python -m pytest tests/store/test_simulation.py -s
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator

import pytest

from incckpt.testing.simulation import Violation
from tests.simulation.rules import RULES, without
from tests.simulation.scenarios import SCENARIOS
from tests.simulation.stories import Story
from tests.simulation.world import simulated

pytestmark = pytest.mark.slow

MORE = int(os.environ.get("INCCKPT_SIMULATION", "0"))
LIMIT = 200_000  # far beyond what any scope has by default
MORE_LIMIT = 300_000
REQUESTS = 6_000 * max(1, 10 * MORE)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    with simulated():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_requests_breaks_a_promise(name: str) -> None:
    explored = SCENARIOS[name].explore(limit=LIMIT)
    print(f"{name}: {explored}")
    assert explored.complete, "a scope is explored whole"


@pytest.mark.skipif(not MORE, reason="minutes: set INCCKPT_SIMULATION=1")
@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.more])
def test_no_order_in_a_larger_scope_breaks_a_promise(name: str) -> None:
    explored = SCENARIOS[name].explore(**SCENARIOS[name].more, limit=MORE_LIMIT)
    print(f"{name}, {dict(SCENARIOS[name].more)}: {explored}")
    assert explored.states > 10_000


@pytest.mark.parametrize("name", RULES)
def test_without_a_rule_some_promise_is_broken(name: str) -> None:
    rule = RULES[name]
    with without(name), pytest.raises(Violation) as caught:
        SCENARIOS[rule.caught].explore(**{**rule.bounds, "limit": LIMIT})
    assert not re.search("(Name|Attribute|Type|Import|Assertion)Error", str(caught.value)), (
        "the edit is wrong, not the rule"
    )
    print(f"without {name!r}: {str(caught.value).splitlines()[0]}")


@pytest.mark.parametrize("seed", range(4))
def test_stories(seed: int) -> None:
    story = Story(seed)
    story.tell(REQUESTS)
    model = story.model
    print(
        f"{story.shuffle.requests} requests: {model.announcements} checkpoints announced, {len(model.pruned)} pruned, "
        f"{model.reads} read, {story.collected} objects collected, {story.killed} processes killed"
    )
    assert min(model.announcements, len(model.pruned), model.reads, story.collected) > 10
