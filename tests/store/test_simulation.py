"""The protocol, proved wrong where it can be: the store's own code, every order of requests.

That each of its rules is needed is tested by ``tests/simulation/test_rules.py``. By default every scenario is explored
whole, with the bounds that are its own. INCCKPT_SIMULATION=1 adds long ones and larger bounds, and makes the stories
ten times as long (2: twenty times, and so on). Stories are drawn from a seed and not by Hypothesis, whose shrinking
needs programs that can be cut; what fails is told by its seed.

    INCCKPT_SIMULATION=1 python -m pytest tests/store/test_simulation.py -s
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.simulation.scenarios import SCENARIOS
from tests.simulation.stories import Story
from tests.simulation.world import simulated

pytestmark = pytest.mark.slow

MORE = int(os.environ.get("INCCKPT_SIMULATION", "0"))
LIMIT = 200_000  # far beyond what any scope has by default
MORE_LIMIT = 300_000
REQUESTS = 6_000 * max(1, 10 * MORE)


@pytest.fixture(autouse=True)
def _simulated() -> Iterator[None]:
    with simulated():
        yield


@pytest.mark.parametrize("name", SCENARIOS)
def test_no_order_of_requests_breaks_a_promise(name: str) -> None:
    if SCENARIOS[name].long and not MORE:
        pytest.skip("most of a minute: set INCCKPT_SIMULATION=1")
    explored = SCENARIOS[name].explore(limit=LIMIT)
    print(f"{name}: {explored}")
    assert explored.complete, "a scope is explored whole"


@pytest.mark.skipif(not MORE, reason="minutes: set INCCKPT_SIMULATION=1")
@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.more])
def test_no_order_in_a_larger_scope_breaks_a_promise(name: str) -> None:
    explored = SCENARIOS[name].explore(**SCENARIOS[name].more, limit=MORE_LIMIT)
    print(f"{name}, {dict(SCENARIOS[name].more)}: {explored}")
    assert explored.states > 10_000


@pytest.mark.parametrize("seed", range(4 if MORE else 2))
def test_stories(seed: int) -> None:
    story = Story(seed)
    story.tell(REQUESTS)
    model = story.model
    print(
        f"{story.shuffle.requests} requests: {model.announcements} checkpoints announced, {len(model.pruned)} pruned, "
        f"{model.reads} read, {story.collected} objects collected, {story.killed} processes killed"
    )
    assert min(model.announcements, len(model.pruned), model.reads, story.collected) > 10
