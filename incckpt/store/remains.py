"""What is left of a run whose documents were damaged, and the lineage that can be made of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from incckpt.errors import CorruptionError, KeyNotFoundError
from incckpt.store.lineage import Run
from incckpt.store.refs import Ref, RefName, list_pins, list_refs

__all__ = ["Remains"]

_Names = Collection[RefName]


@dataclass(frozen=True)
class Remains:
    """What stands of a run. Every document is read on its own: none is relied on for what another should say.

    Attributes
    ----------
    attempt
        The highest attempt that anything names, a tombstone or a pin included; 0 if nothing does.
    standing
        The refs that stand, readable or not, by name.
    in_flight
        The refs that saves in flight, or killed ones, have announced.
    seals
        What each attempt inherited and abandoned, where that can be read.
    damaged
        What is wrong with lineage documents that cannot be read, by key.
    """

    attempt: int
    standing: tuple[RefName, ...]
    in_flight: tuple[RefName, ...]
    seals: Mapping[int, tuple[_Names, _Names]] = field(repr=False)
    damaged: Mapping[str, str]

    @classmethod
    def of(cls, run: Run) -> Remains:
        """Look at a run: four listings, and a request for each attempt.

        Raises
        ------
        FormatError, CorruptionError
            If a later version of incckpt has written there.
        """
        while True:
            made, sealed = run.listed_attempts()
            pins = [pin.name for pin in list_pins(run.backend, run.name)]
            refs = [(name, tombstone) for _, name, _, tombstone in list_refs(run.backend, run.name) if name is not None]
            if run.listed_attempts() == (made, sealed):  # else a ref may be of an attempt that was not listed yet
                break
        highest = max([0, *made, *(name.attempt for name in pins), *(name.attempt for name, _ in refs)])
        seals: dict[int, tuple[_Names, _Names]] = {}
        damaged: dict[str, str] = {}
        for attempt in sorted(sealed):
            try:
                seals[attempt] = run.read_seal(attempt)
            except KeyNotFoundError:
                continue  # removed since it was listed
            except CorruptionError as error:
                damaged[run.seal_key(attempt)] = str(error)
        there = {name for name, _ in refs}
        return cls(
            highest,
            tuple(sorted(name for name, tombstone in refs if not tombstone)),
            tuple(sorted(name for name in pins if name not in there)),
            seals,
            damaged,
        )

    def as_read(self, refs: Mapping[RefName, Ref | None]) -> tuple[list[RefName], list[RefName]]:
        """Return the lineage that readers take, and what is abandoned by it.

        Parameters
        ----------
        refs
            What each ref that stands says, where it can be read.
        """
        sealed = max(self.seals, default=0)
        inherited, left = self.seals.get(sealed, ((), ()))
        live = [name for name in self.standing if name.attempt == sealed or name in inherited]
        chosen = _newest(live, refs)
        return chosen, [name for name in self.standing if name not in chosen and (name in live or name in left)]

    def rebuilt(self, whole: Mapping[RefName, Ref | None]) -> tuple[list[RefName], list[RefName]]:
        """Return the checkpoints that a new attempt should inherit, by step, and those that it should abandon.

        An attempt that wrote down what it inherited is believed. Of what it does not mention, and for an attempt whose
        document is lost, it is taken to have gone on from the checkpoints before its own first: those of earlier
        attempts at and beyond that step are abandoned, as it would have done on starting.

        Parameters
        ----------
        whole
            The checkpoints that may be inherited, with their refs where these can be read. All others that stand are
            abandoned: they can be deleted by step, and what they need is known as far as it can be.
        """
        live: list[RefName] = []
        for attempt in sorted(self.seals.keys() | {name.attempt for name in whole}):
            inherited, left = self.seals.get(attempt, ((), ()))
            kept = [name for name in whole if name.attempt == attempt or name in inherited]
            first = min((name.step for name in kept), default=math.inf)
            known = {*kept, *left}
            live = [name for name in live if name not in known and name.step < first] + kept
        if whole and not live:  # all that was not abandoned is lost
            return replace(self, seals={}).rebuilt(whole)
        chosen = _newest(live, whole)
        return chosen, sorted(set(self.standing) - set(chosen), key=lambda name: (name.step, name))


def _newest(names: _Names, refs: Mapping[RefName, Ref | None]) -> list[RefName]:
    """Return the newest checkpoint of each step, by step: a checkpoint has a later time than what it has replaced."""

    def age(name: RefName) -> tuple[int, float, str]:
        ref = refs.get(name)
        return name.attempt, -math.inf if ref is None else ref.time, name.nonce

    newest = {name.step: name for name in sorted(names, key=age)}
    return [name for _, name in sorted(newest.items())]
