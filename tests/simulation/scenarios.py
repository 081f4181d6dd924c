"""Small worlds whose every order of requests is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from incckpt.retention import KeepLast
from incckpt.testing.exploration import Explored, Explorer
from incckpt.testing.simulation import Program, Server, SimulatedBackend, run_alone
from tests.simulation.tiers import BUCKET, TieredPromises, at, losing, machine, with_tiers
from tests.simulation.world import Promises, collector, copier, deleter, is_live, looker, reader, recoverer, saver

TIMED = ("pins/", "gc/", "refs/", "probe/")


@dataclass(frozen=True)
class Scenario:
    """Who does what at the same time.

    Attributes
    ----------
    before
        Programs that run one after the other first; with a text, until just before the request that begins so.
    programs
        Those whose orders are tried.
    bounds
        For `Explorer`.
    more
        Other bounds, for a longer exploration.
    leaks
        In one of how many contents of the server a last sweep is tried.
    restarts
        Whether a restart and one save suffice, too.
    undisturbed
        Programs that no other may stop.
    replaces
        Whether one of them replaces checkpoints.
    remote
        Whether answers come over a network, where they may be wrong.
    long
        Whether it takes most of a minute, too long for every run of the tests.
    """

    before: Sequence[Program | tuple[Program, str]]
    programs: Mapping[str, Program]
    bounds: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    leaks: int = 1
    restarts: bool = False
    undisturbed: Sequence[str] = ()
    replaces: bool = False
    remote: bool = False
    long: bool = False

    @property
    def killed(self) -> bool:
        """Whether one of the programs before was killed."""
        return any(isinstance(program, tuple) for program in self.before)

    def explore(self, **bounds: Any) -> Explored:
        """Try every order.

        Raises
        ------
        Violation
        """
        server = Server(timed=TIMED)
        self._begin(server)
        bounds = {**self.bounds, **bounds}
        disturbances = ("faults", "advances", "lies", "damages")
        undisturbed = not any(map(bounds.get, disturbances)) and not self.killed
        lies = bool(bounds.get("lies") or bounds.get("damages"))
        promises = Promises(
            leaks=0 if lies else self.leaks,
            restarts=self.restarts,
            all_done=self.programs.keys() if undisturbed else None,
            undisturbed=self.undisturbed,
            replaces=self.replaces,
            standing=[key for key in server.values if key.startswith("refs/") and is_live(server, key)],
            lies=lies,
        )
        with mock.patch.object(SimulatedBackend, "remote", self.remote):
            explorer = Explorer(server, self.programs, check=promises.check, changed=promises.changed, **bounds)
            return explorer.explore()

    def _begin(self, server: Server) -> list[object]:
        """Run what comes before; return what it told."""
        told: list[object] = []
        for number, program in enumerate(self.before):
            until = None
            if isinstance(program, tuple):
                program, until = program
            told += run_alone(server, program, number=number, until=until).events
        return told


@dataclass(frozen=True)
class TieredScenario(Scenario):
    """Machines with local tiers, and what else uses the bucket.

    Attributes
    ----------
    folders
        Of the local tiers.
    copies
        Whether every copy must succeed.
    """

    folders: Sequence[str] = ("a/",)
    copies: bool = False

    def explore(self, **bounds: Any) -> Explored:
        """Try every order.

        Raises
        ------
        Violation
        """
        server = Server(timed=tuple(folder + key for folder in (BUCKET, *self.folders) for key in TIMED))
        with with_tiers():
            told = self._begin(server)
            saved = {event[1]: event[2] for event in told if isinstance(event, tuple) and event[0] == "saving"}
            bounds = {**self.bounds, **bounds}
            leaks = 0 if bounds.get("damages") else self.leaks
            promises = TieredPromises(self.folders, server, copies=self.copies, saved=saved, leaks=leaks)
            explorer = Explorer(server, self.programs, check=promises.check, changed=promises.changed, **bounds)
            return explorer.explore()


LAST = KeepLast(1)
first = saver((100, "a", "b"))

SCENARIOS: dict[str, Scenario] = {
    "a writer and its replacement": Scenario(
        [first], {"old": saver((200, "a", "b1"), ready=0), "new": saver((200, "a", "c"))}, {"faults": 1}
    ),
    "a pruning writer and its replacement": Scenario(
        [first],
        {
            "old": saver((200, "c", "b1"), (300, "c", "b2"), ready=1, policy=LAST),
            "new": saver((400, "a", "b"), policy=LAST),
        },
        {"faults": 1, "faulty": ("lost",), "faulty_at": ("refs/",), "switches": 3},
        {"faults": 1},
        long=True,
    ),
    "a replacement that goes back to what the writer prunes": Scenario(
        [first],
        {
            "old": saver((200, "c", "b1"), (300, "d", "e"), ready=1, policy=LAST),
            "new": saver((250, "c", "b2"), step=200),
        },
        {},
        {"faults": 1},
        long=True,
    ),
    "two replacements at once": Scenario(
        [first],
        {"old": saver((200, "a", "b1"), ready=0), "new": saver((200, "a")), "other": saver((200, "b"))},
        {"switches": 3},
        {"switches": 5},
        long=True,
    ),
    "a writer, and one who only looks": Scenario(
        [first],
        {"r": saver((200, "a", "c"), (300, "a", "d"), ready=0), "looker": looker()},
        {"faults": 1},
        undisturbed=["r", "looker"],
    ),
    "a save from what was restored before others moved on": Scenario(
        [first],
        {
            "r": saver((200, "a", "c"), (300, "a", "d"), ready=(0, 1)),
            "late": saver((250, "a", "e"), restored=True),
        },
        {"opening": ("r", "late", "r")},
        {"faults": 1, "opening": ("r", "late", "r")},
        undisturbed=["r"],
    ),
    "a save from what was restored while others move on": Scenario(
        [first],
        {
            "old": saver((200, "a", "c"), (300, "a", "d"), ready=0),
            "new": saver((150, "a", "e"), restored=True),
        },
        {"opening": ("old", "new")},
        {"faults": 1, "opening": ("old", "new")},
    ),
    "two that have restored the same": Scenario(
        [first],
        {"one": saver((200, "a", "c"), restored=True), "other": saver((200, "a", "d"), restored=True)},
        {},
        {"faults": 1},
    ),
    "two that append": Scenario(
        [first],
        {"one": saver((200, "a", "c"), restores=False), "other": saver((210, "a", "d"), restores=False)},
        {"switches": 3},
        {"switches": 5},
    ),
    "a beginning that fails": Scenario(
        [first],
        {"r": saver((200, "a", "c"), (300, "a", "d"), (400, "a", "b"), restored=True)},
        {"faults": 2, "faulty_at": ("runs/",)},
        {"faults": 2},
        undisturbed=["r"],
    ),
    "a checkpoint is replaced, and the run changes hands": Scenario(
        [first],
        {
            "old": saver((200, "a", "c"), (200, "a", "d"), ready=0, if_exists="replace"),
            "new": saver((300, "a", "e")),
        },
        {"switches": 2, "faults": 1, "faulty": ("dropped",), "faulty_at": ("refs/",)},
        {"switches": 3, "faults": 1},
        replaces=True,
    ),
    "back, and forth to what was abandoned": Scenario(
        [first, saver((200, "a", "c")), saver((150, "b", "c"), step=100)],
        {"old": saver((170, "b", "d"), ready=0, policy=LAST), "new": saver((300, "a", "e"), step=200, policy=LAST)},
        {"switches": 3},
        {"switches": 5},
    ),
    "two runs of one content, one pruned": Scenario(
        [first],
        {
            "r": saver((200, "c", "d"), ready=0, policy=LAST),
            "q": saver((10, "a", "b"), (11, "a", "b"), run="q"),
        },
        {},
        {"faults": 1, "advances": 1},
    ),
    "two ranks under one pin, beside a run of one content that is pruned": Scenario(
        [first],
        {
            "r": saver((200, "c", "d"), ready=0, policy=LAST),
            "q": saver((10, "a", "b"), (11, "a", "b"), run="q", joint=True),
        },
        {"switches": 2},
    ),
    "two ranks with equal shards under one pin, beside a run of one content that is pruned": Scenario(
        [first],
        {
            "r": saver((200, "c", "d"), ready=0, policy=LAST),
            "q": saver((10, "a", "a"), (11, "e", "e"), run="q", joint=True),
        },
        {"switches": 2},
    ),
    "two runs that prune one content": Scenario(
        [first, saver((10, "a", "b"), run="q")],
        {
            "r": saver((200, "c"), ready=0, policy=LAST),
            "q": saver((20, "d"), run="q", ready=0, policy=LAST),
        },
        {},
        {"faults": 1},
    ),
    "a pruner, a saver and a collector": Scenario(
        [first],
        {
            "r": saver((200, "c", "d"), ready=0, policy=LAST),
            "q": saver((10, "a", "b"), run="q"),
            "gc": collector(),
        },
        {"switches": 2},
        {"switches": 4},
    ),
    "garbage, a saver that could use it, two collectors": Scenario(
        [(first, "create refs/")],
        {"q": saver((10, "a", "b"), run="q"), "gc": collector(), "other gc": collector()},
        {"switches": 3},
        {"switches": 5},
    ),
    "a stalled saver that uses garbage is given up": Scenario(
        [(first, "create refs/")],
        {"q": saver((10, "a", "b"), run="q"), "gc": collector()},
        {"advances": 1},
        {"advances": 2, "faults": 1},
    ),
    "a stalled saver is given up": Scenario(
        [first],
        {"r": saver((200, "a", "c"), (300, "d", "c"), ready=0), "gc": collector(3)},
        {"advances": 1},
        {"advances": 2, "faults": 1},
    ),
    "an unfinished save of a delta is taken up, beside a collector": Scenario(
        [first, (saver((200, "a", "b1")), "create refs/")],
        {"r": saver((200, "a", "b1")), "gc": collector()},
        {"switches": 3},
        {"faults": 1, "advances": 1},
    ),
    "a copy of what is garbage here, beside a collector": Scenario(
        [first, (saver((200, "a", "b1")), "create refs/")],
        {"copy": copier((100, "a", "b"), (200, "a", "b1")), "gc": collector()},
        {"switches": 3},
        {"faults": 1, "advances": 1},
        long=True,
    ),
    "a copy, and the one that replaces it": Scenario(
        [(copier((100, "a", "b"), (200, "a", "b1")), "create refs/")],
        {
            "old": copier((100, "a", "b"), (200, "a", "b1"), ready=0),
            "new": copier((100, "a", "b"), (200, "a", "b1"), (300, "c", "b1"), policy=LAST),
        },
        {"switches": 2},
        {"switches": 3, "faults": 1},
        long=True,
    ),
    "a reader while there is pruning": Scenario(
        [first],
        {"r": saver((200, "c", "b1"), (300, "c", "b2"), ready=0, policy=LAST), "reader": reader(times=2)},
        {},
        {"faults": 1, "advances": 1},
    ),
    "a reader while the run changes hands": Scenario(
        [first],
        {"new": saver((200, "c", "b1"), (300, "c", "b2"), policy=LAST), "reader": reader()},
        {},
        {"faults": 1},
    ),
    "a lone writer that prunes, badly connected": Scenario(
        [first],
        {"r": saver((200, "c", "b1"), (300, "c", "b2"), (400, "a", "b2"), ready=0, policy=LAST)},
        {"faults": 1, "faulty": ("dropped", "lost")},
        {"faults": 2, "faulty": ("dropped", "lost")},
        leaks=1,
        restarts=True,
    ),
    "a lone writer that prunes, its requests late": Scenario(
        [first],
        {"r": saver((200, "c", "b1"), (300, "c", "b2"), (400, "a", "b2"), ready=0, policy=LAST)},
        {"faults": 1, "faulty": ("late",), "advances": 1},
        {"faults": 2, "faulty": ("late", "again"), "advances": 2},
        long=True,
    ),
    "a commit that is lost again and again": Scenario(
        [first],
        {"old": saver((200, "a", "c"), (200, "a", "d"), ready=0), "gc": collector()},
        {"faults": 4, "faulty_at": ("refs/",), "switches": 1, "faulty": ("late", "dropped")},
        {"faults": 4, "faulty_at": ("refs/",), "switches": 3},
    ),
    "a deletion by name": Scenario(
        [first, saver((200, "a", "c"))],
        {"old": saver((300, "b", "c"), ready=0), "deleter": deleter(200), "reader": reader()},
        {"switches": 3},
        {"switches": 5},
    ),
}

LIES: dict[str, Scenario] = {
    "a restart, and one wrong answer": Scenario(
        [first, saver((200, "a", "c"))],
        {"r": saver((300, "a", "d"), policy=KeepLast(2))},
        {"lies": 1},
        {"lies": 2},
        remote=True,
    ),
    "a writer that appends, and one wrong answer": Scenario(
        [first, saver((200, "a", "c"))],
        {"r": saver((300, "a", "d"), (400, "c", "d"), policy=LAST, restores=False)},
        {"lies": 1},
        {"lies": 2},
        remote=True,
        long=True,
    ),
    "a writer and its replacement, and one wrong answer": Scenario(
        [first],
        {"old": saver((200, "a", "b1"), ready=0), "new": saver((300, "a", "c"))},
        {"lies": 1, "switches": 2, "lying_at": ("pins/",)},
        {"lies": 1, "switches": 2, "lying_at": ("pins/", "refs/")},
        remote=True,
    ),
    "two runs of one content, one pruned, and one wrong answer": Scenario(
        [first],
        {"r": saver((200, "c", "d"), ready=0, policy=LAST), "q": saver((10, "a", "b"), run="q")},
        {"lies": 1, "switches": 1, "lying_at": ("pins/", "gc/", "refs/")},
        {"lies": 1, "switches": 2},
        remote=True,
    ),
    "garbage, a saver that could use it, a collector, and one wrong answer": Scenario(
        [(first, "create refs/")],
        {"q": saver((10, "a", "b"), run="q"), "gc": collector()},
        {"lies": 1, "switches": 2},
        {"lies": 1, "switches": 3},
        remote=True,
    ),
    "damage before or during a restart": Scenario(
        [first, saver((200, "a", "c"))],
        {"r": saver((300, "a", "d"), policy=KeepLast(2)), "reader": reader()},
        {"damages": 1, "switches": 1, "damaged_at": ("runs/", "refs/", "objects/", "deltas/", "incckpt.json")},
        {"damages": 1, "switches": 2, "damaged_at": ("runs/", "refs/", "objects/", "deltas/", "incckpt.json")},
    ),
    "damage while two runs share content and one is pruned": Scenario(
        [first, saver((10, "a", "b"), run="q")],
        {"r": saver((200, "c"), ready=0, policy=LAST), "gc": collector()},
        {"damages": 1, "switches": 1, "damaged_at": ("runs/", "refs/", "objects/", "incckpt.json")},
        {"damages": 1, "switches": 2, "damaged_at": ("runs/", "refs/", "objects/", "incckpt.json")},
    ),
    "damage, and a recovery beside the run's writer": Scenario(
        [first, saver((200, "a", "c"))],
        {"r": saver((300, "a", "d"), ready=0), "recoverer": recoverer()},
        {"damages": 1, "switches": 1, "damaged_at": ("runs/",)},
        {"damages": 1, "switches": 2, "damaged_at": ("runs/", "refs/")},
    ),
    "damage, a recovery, and a reader": Scenario(
        [first, saver((200, "a", "c"))],
        {"recoverer": recoverer(), "reader": reader()},
        {"damages": 1, "switches": 1, "damaged_at": ("runs/",)},
        {"damages": 1, "switches": 2, "damaged_at": ("runs/", "refs/")},
    ),
}

LOCAL = tuple(f"a/{folder}" for folder in ("refs/", "objects/", "deltas/", "runs/", "tiers/", "incckpt.json"))
saved_and_copied = machine((100, "a", "b"))

TIERS: dict[str, Scenario] = {
    "a machine that copies what it prunes": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), (300, "c", "d"), policy=LAST)},
        {"switches": 1},
        {"switches": 4},
        copies=True,
    ),
    "a machine that copies, its bucket badly connected": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), (300, "c", "d"), policy=LAST)},
        {"switches": 0, "faults": 1, "faulty_at": (BUCKET,)},
        {"switches": 1, "faults": 2, "faulty_at": (BUCKET,)},
        long=True,
    ),
    "a machine that copies more slowly than it saves": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), (300, "c", "d"), (400, "e", "d"), max_pending=1, policy=LAST)},
        {"switches": 0},
        {"switches": 3},
        copies=True,
    ),
    "a machine that copies, and a collector in the bucket": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), (300, "c", "d"), policy=LAST), "gc": at(BUCKET, collector())},
        {"switches": 1},
        {"switches": 3},
    ),
    "a machine taken for dead, and another that goes on from the bucket": TieredScenario(
        [saved_and_copied],
        {
            "m": machine((200, "c", "b1"), (300, "c", "d"), (310, "c", "e"), max_pending=3, restored=True),
            "other": machine((250, "a", "e"), (260, "a", "f"), folder="b/", restored=True),
        },
        {"switches": 1},
        {"switches": 2},
        folders=("a/", "b/"),
        long=True,
    ),
    "a machine comes back, and the bucket was written from elsewhere": TieredScenario(
        [saved_and_copied, (machine((300, "c", "b1")), "create bucket/refs/")],
        {"other": machine((250, "a", "e"), folder="b/"), "m": machine((400, "c", "d"))},
        {"switches": 1},
        {"switches": 2, "faults": 1, "faulty_at": (BUCKET,)},
        folders=("a/", "b/"),
        long=True,
    ),
    "a machine comes back, and cannot reach the bucket": TieredScenario(
        [saved_and_copied, (machine((200, "c", "b1")), "create bucket/refs/"), machine((250, "a", "e"), folder="b/")],
        {"m": machine((300, "c", "d"))},
        {"switches": 0, "faults": 1, "faulty": ("dropped",), "faulty_at": (BUCKET,)},
        {"switches": 2, "faults": 3, "faulty_at": (BUCKET,)},
        folders=("a/", "b/"),
    ),
    "a machine is started again, and its last process lives": TieredScenario(
        [saved_and_copied],
        {"old": machine((200, "c", "b1"), (300, "c", "d")), "new": machine((400, "a", "e"))},
        {"switches": 1},
        {"switches": 2},
        long=True,
    ),
    "a machine goes back to an earlier checkpoint": TieredScenario(
        [machine((100, "a", "b"), (200, "c", "b"), keep=2)],
        {"m": machine((150, "c", "b1"), (160, "c", "d"), step=100, keep=2)},
        {"switches": 0},
        {"switches": 3},
    ),
    "a machine's disk fails": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), (300, "c", "d"), policy=LAST)},
        {"switches": 0, "faults": 1, "faulty": ("dropped",), "faulty_at": ("a/",)},
        {"switches": 1, "faults": 2, "faulty_at": ("a/",)},
        long=True,
    ),
    "a machine's disk is lost": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), (300, "c", "d"), policy=LAST), "disk": losing("a/")},
        {"switches": 1},
        {"switches": 3},
    ),
    "a machine's disk is damaged": TieredScenario(
        [saved_and_copied],
        {"m": machine((200, "c", "b1"), policy=LAST)},
        {"switches": 0, "damages": 1, "damaged_at": LOCAL},
        {"switches": 1, "damages": 1, "damaged_at": LOCAL},
        long=True,
    ),
}

SCENARIOS.update(LIES)
SCENARIOS.update(TIERS)
