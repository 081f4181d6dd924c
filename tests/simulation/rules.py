"""The rules of the protocol, and the library without each of them in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from incckpt.run.attempt import Attempt
from incckpt.run.recovery import Recoverer
from incckpt.run.shards import ShardWriter
from incckpt.run.upload import Uploader
from incckpt.run.writer import Writer
from incckpt.store import objects, refs, rereading
from incckpt.store.gc import Collector
from incckpt.store.lineage import Run
from incckpt.tiers.copies import Copies
from incckpt.tiers.follows import Follows
from incckpt.tiers.position import TieredPosition
from tests.simulation.edits import Edit, EditError


@dataclass(frozen=True)
class Rule:
    """A rule of the protocol.

    Attributes
    ----------
    without
        Edits that take it away.
    caught
        Name of the scenario in which its absence shows.
    bounds
        Of the exploration, where they are not the scenario's own; a seed where the orders that it draws show the
        absence sooner.
    """

    caught: str
    without: Sequence[Edit]
    bounds: Mapping[str, Any] = field(default_factory=dict)


RULES: dict[str, Rule] = {
    # -- a save
    "the pin is put before the condemned lists are read": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                Writer,
                "_write_as",
                """
                - self._run.pin(name)
                + condemned = self._store.condemned.keys()
                + self._run.pin(name)
                - known = self._look_around(name)
                + known = Known(condemned, self._look_around(name).vouched)
                """,
            )
        ],
        {"seed": 1},
    ),
    "every rank looks for itself what is condemned, once the pin is put": Rule(
        "two ranks under one pin, beside a run of one content that is pruned",
        [
            Edit(
                ShardWriter,
                "put",
                """
                - known = self._look_around(brief if brief.save == save else None)
                + known = Known(frozenset(), self._look_around(brief if brief.save == save else None).vouched, sure=True)
                """,
            )
        ],
    ),
    "what is condemned is not used": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                Writer,
                "_look_around",
                """
                - return Known(condemned | lost, vouched - lost, sure=inherited)
                + return Known(lost, vouched - lost, sure=inherited)
                """,
            )
        ],
    ),
    "what is condemned is not used, even if the last checkpoint needs it": Rule(
        "a replacement that goes back to what the writer prunes",
        [
            Edit(
                Uploader,
                "_usable",
                """
                - if str(key) in known.condemned:
                + if str(key) in known.condemned and not look:
                """,
            ),
            Edit(
                Uploader,
                "_is_there",
                """
                - return str(key) not in self._surely_condemned(known)
                + return True
                """,
            ),
        ],
    ),
    "what is condemned is not used, even if it is found": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                Uploader,
                "_reusable",
                """
                - if str(key) not in self._surely_condemned(known):
                + if True:
                """,
            )
        ],
    ),
    "no two saves put one key": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                Writer,
                "_write_as",
                """
                - chunks = self._uploader.store(snapshot, name.nonce, known, report)
                + chunks = self._uploader.store(snapshot, "0" * 16, known, report)
                """,
            )
        ],
    ),
    "the ref of what is reused is read again": Rule(
        "a replacement that goes back to what the writer prunes",
        [
            Edit(
                Writer,
                "_vouched",
                """
                - return keys if isinstance(self._run.read(name), Ref) else frozenset()
                + return keys
                """,
            )
        ],
        {"seed": 1},
    ),
    "what no ref vouches for is looked at": Rule(
        "a stalled saver that uses garbage is given up",
        [
            Edit(
                Uploader,
                "_usable",
                """
                - if str(key) not in known.vouched and not (look and self._is_there(key, one.size, known)):
                + if str(key) not in known.vouched and not look:
                """,
            )
        ],
    ),
    "a delta's base is vouched for or looked at": Rule(
        "a replacement that goes back to what the writer prunes",
        [
            Edit(
                Uploader,
                "_base",
                """
                - return full if stored is not None and self._usable(stored, known) else None
                + return full if stored is not None else None
                """,
            )
        ],
        {"seed": 1},
    ),
    "a manifest lists the bases of its deltas": Rule(
        "a reader while there is pruning",
        [
            Edit(
                objects,
                "manifest_keys",
                """
                - return frozenset(str(key) for chunk in manifest.chunks for key in chunk_keys(chunk))
                + return frozenset(str(chunk_keys(chunk)[0]) for chunk in manifest.chunks)
                """,
            )
        ],
    ),
    "what an unfinished save has put is not used if it is condemned": Rule(
        "an unfinished save of a delta is taken up, beside a collector",
        [
            Edit(
                Uploader,
                "_left_delta",
                """
                - if self._is_there(key, size, known):
                + if True:
                """,
            )
        ],
    ),
    "a copy uses nothing that is condemned": Rule(
        "a copy of what is garbage here, beside a collector",
        [
            Edit(
                Uploader,
                "find",
                """
                - if self._usable(candidate, known):
                + if True:
                """,
            )
        ],
    ),
    "the ref comes last": Rule(
        "a writer and its replacement",
        [
            Edit(
                Writer,
                "_put_manifest",
                """
                - self._uploader.pipeline.together(lambda act: act(), acts)
                + self._later = (key, data)
                """,
            ),
            Edit(
                Writer,
                "_write_as",
                """
                - outcome = self._commit(ref, manifest)
                + outcome = self._commit(ref, manifest)
                + self._uploader.put(*self._later)
                """,
            ),
        ],
    ),
    "an aborted save is not a success": Rule(
        "a writer and its replacement",
        [
            Edit(
                Writer,
                "_write_as",
                """
                - if outcome is Tombstone.ABORTED:
                + if False:
                """,
            )
        ],
    ),
    # -- a commit
    "the commit is exclusive": Rule(
        "a writer and its replacement",
        [
            Edit(
                refs,
                "create_once",
                """
                - backend.create(key, data)
                + backend.put(key, data)
                """,
            )
        ],
    ),
    "a conflict is read back": Rule(
        "a writer and its replacement",
        [
            Edit(
                refs,
                "create_once",
                """
                - return None if found == bytes(data) else found
                + return None
                """,
            )
        ],
    ),
    "a lost reply is read back": Rule(
        "a writer and its replacement",
        [
            Edit(
                refs,
                "create_once",
                """
                - return None if found == bytes(data) else found
                + return found
                """,
            )
        ],
    ),
    "the pin stands while the commit's outcome is unknown": Rule(
        "a commit that is lost again and again",
        [
            Edit(
                Writer,
                "_commit",
                """
                - self._unsettled.append((ref, manifest, self._uploader.tried))
                + self._discards.spend([self._run.pin_key(ref.name)])
                """,
            )
        ],
    ),
    "an unknown outcome is found out before the next save": Rule(
        "a commit that is lost again and again",
        [
            Edit(
                Writer,
                "_commit",
                """
                - self._unsettled.append((ref, manifest, self._uploader.tried))
                + pass
                """,
            )
        ],
    ),
    # -- attempts and lineage
    "an attempt is created exclusively": Rule(
        "two replacements at once",
        [
            Edit(
                Run,
                "start_attempt",
                """
                - while create_once(self.backend, self._attempt_key(attempt), document) is not None:
                + while self.backend.put(self._attempt_key(attempt), document) is not None:
                """,
            )
        ],
    ),
    "a replacement aborts what its predecessors have in flight": Rule(
        "a writer and its replacement",
        [
            Edit(
                Run,
                "start_attempt",
                """
                - self.abort(name)
                + pass
                """,
            )
        ],
    ),
    "a replacement chooses after it has aborted": Rule(
        "a writer and its replacement",
        [
            Edit(
                Attempt,
                "start",
                """
                - history, abandoned = self._chosen()
                + pass
                - number, unfinished = self._run.start_attempt(
                -     self._document, None if origin.appends else origin.lineage.attempt
                - )
                + history, abandoned = self._chosen()
                + number, unfinished = self._run.start_attempt(
                +     self._document, None if origin.appends else origin.lineage.attempt
                + )
                """,
            )
        ],
    ),
    "a writer looks for a higher attempt": Rule(
        "a writer and its replacement",
        [
            Edit(
                Writer,
                "_not_superseded",
                """
                - self._run.check_not_superseded(self._attempt)
                + pass
                """,
            )
        ],
        {"switches": 2, "seed": 1},
    ),
    "a writer looks for a higher attempt after it has put its pin": Rule(
        "a writer and its replacement",
        [
            Edit(
                Writer,
                "_write_as",
                """
                - self._run.pin(name)
                + self._run.check_not_superseded(self._attempt)
                + self._run.pin(name)
                - known = self._look_around(name)
                + known = Known(self._store.condemned.keys(), self._vouched())
                """,
            )
        ],
        {"seed": 0},
    ),
    "a restore starts no attempt": Rule(
        "a writer, and one who only looks",
        [
            Edit(
                Attempt,
                "__init__",
                """
                - self._collector = Collector(store, discard=self._discards.spend)
                + self._collector = Collector(store, discard=self._discards.spend)
                + self.start()
                """,
            )
        ],
    ),
    "a save looks whether the run has moved on before it takes it over": Rule(
        "a save from what was restored before others moved on",
        [
            Edit(
                Attempt,
                "start",
                """
                - self._run.standing(origin.lineage)
                + pass
                """,
            )
        ],
    ),
    "a save looks whether the run has moved on after it has taken it over": Rule(
        "a save from what was restored while others move on",
        [
            Edit(
                Run,
                "standing",
                """
                - if newer:
                + if newer and sealed != seen.sealed:
                - return frozenset(standing & known)
                + return frozenset(standing)
                """,
            ),
        ],
    ),
    "of those that have restored the same one takes the run over": Rule(
        "two that have restored the same",
        [
            Edit(
                Run,
                "start_attempt",
                """
                - if after is not None:
                + if False:
                """,
            )
        ],
    ),
    "an attempt that begins again goes on with the same number": Rule(
        "a beginning that fails",
        [
            Edit(
                Attempt,
                "start",
                """
                - number, unfinished = self._run.start_attempt(
                -     self._document, None if origin.appends else origin.lineage.attempt
                - )
                + number, unfinished = self._run.start_attempt(
                +     self._run.new_attempt(), None if origin.appends else origin.lineage.attempt
                + )
                """,
            )
        ],
    ),
    # -- replacing
    "a replacement is committed before what it replaces is expired": Rule(
        "a checkpoint is replaced, and the run changes hands",
        [
            Edit(
                Attempt,
                "write",
                """
                - ref, manifest = self._writer.write(self._after_the_replaced(snapshot), report)
                + replaced = [name for name in self._history if name.step == snapshot.step]
                + later = self._after_the_replaced(snapshot)
                + self._expire(replaced)
                + ref, manifest = self._writer.write(later, report)
                """,
            )
        ],
    ),
    "of two checkpoints of a step one counts": Rule(
        "a checkpoint is replaced, and the run changes hands",
        [
            Edit(
                Run,
                "_newest",
                """
                - newest += same[-1:]
                - replaced += same[:-1]
                + newest += same
                """,
            )
        ],
    ),
    "a replacement has a later time than what it replaces": Rule(
        "a checkpoint is replaced, and the run changes hands",
        [
            Edit(
                Attempt,
                "_after_the_replaced",
                """
                - times = [ref.time for ref in self._history.values() if ref is not None and ref.step == snapshot.step]
                + times = []
                """,
            )
        ],
    ),
    "what an attempt continues is written down before its first save": Rule(
        "a writer and its replacement",
        [
            Edit(
                Run,
                "seal",
                """
                - self.backend.put(self.seal_key(attempt), lineage_document(attempt, list(inherited), list(abandoned)))
                + pass
                """,
            )
        ],
    ),
    "whom another attempt overtakes looks again": Rule(
        "a reader while the run changes hands",
        [
            Edit(
                Run,
                "lineage",
                """
                - if view.live and latest <= sealed:
                + if True:
                """,
            )
        ],
    ),
    # -- retention
    "others' refs are overwritten with EXPIRED": Rule(
        "a pruning writer and its replacement",
        [
            Edit(
                Run,
                "expire",
                """
                - if committed is not None and now - committed >= COPY_SECONDS:
                + if committed is None or now - committed >= COPY_SECONDS:
                - for name in deletable:
                -     del self._committed[name]
                + pass
                """,
            )
        ],
        {"switches": 2, "seed": 1},
    ),
    "own refs are not deleted as long as copies of the commit may come": Rule(
        "a lone writer that prunes, its requests late",
        [
            Edit(
                Run,
                "expire",
                """
                - if committed is not None and now - committed >= COPY_SECONDS:
                + if committed is not None:
                """,
            )
        ],
        {"seed": 0},
    ),
    "own tombstones are not deleted as long as copies of the commit may come": Rule(
        "a lone writer that prunes, its requests late",
        [
            Edit(
                Run,
                "take_tombstones",
                """
                - done = [name for name, committed in self._buried.items() if now - committed >= COPY_SECONDS]
                + done = list(self._buried)
                """,
            )
        ],
        {"seed": 0},
    ),
    "condemned before expired": Rule(
        "a lone writer that prunes, badly connected",
        [
            Edit(
                Attempt,
                "_expire",
                """
                - self._collector.condemn([self._run.ref_key(name) for name in doomed])
                + pass
                - self._run.expire(doomed)
                + self._run.expire(doomed)
                + self._collector.condemn([self._run.ref_key(name) for name in doomed])
                """,
            )
        ],
    ),
    "a pruned ref counts no longer, even if the look after it fails": Rule(
        "a lone writer that prunes, badly connected",
        [
            Edit(
                Attempt,
                "_expire",
                """
                - self._collector.expired([self._run.ref_key(name) for name in doomed])
                + pass
                """,
            )
        ],
    ),
    "what other runs need is looked up when it is to be deleted": Rule(
        "two runs that prune one content",
        [
            Edit(
                Collector,
                "condemn",
                """
                - keys = {
                -     key for run, counts in freed.items() for key, count in counts.items() if self._users_in[run][key] <= count
                - }
                + keys = {key for run, counts in freed.items() for key, count in counts.items() if self._users[key] <= count}
                """,
            )
        ],
    ),
    # -- collection
    "a collector waits for saves in flight": Rule(
        "a pruner, a saver and a collector",
        [
            Edit(
                Collector,
                "finish",
                """
                - own.blockers = in_flight if own.blockers is None else own.blockers & in_flight
                + own.blockers = frozenset()
                """,
            )
        ],
    ),
    "the list is put before the pins are listed": Rule(
        "a pruner, a saver and a collector",
        [
            Edit(
                Collector,
                "carry_out",
                """
                - collected = self.finish()
                + collected = self.finish(plan.in_flight)
                """,
            ),
            Edit(
                Collector,
                "finish",
                """
                - def finish(self) -> Collected:
                + def finish(self, in_flight=None):
                - in_flight = self._in_flight()
                + in_flight = self._in_flight() if in_flight is None else in_flight
                """,
            ),
        ],
    ),
    "refs are listed after the pins": Rule(
        "a pruner, a saver and a collector",
        [
            Edit(
                Collector,
                "_pins",
                """
                - pins = list_pins(self._backend, twice=twice)
                - existing = self._look(twice=twice)
                + existing = self._look(twice=twice)
                + pins = list_pins(self._backend, twice=twice)
                """,
            )
        ],
        {"seed": 2},
    ),
    "refs are listed again before anything is deleted": Rule(
        "a pruner, a saver and a collector",
        [
            Edit(
                Collector,
                "_pins",
                """
                - existing = self._look(twice=twice)
                + existing = {key for _, _, key, _ in list_refs(self._backend)}
                """,
            )
        ],
    ),
    "a stale save is aborted": Rule(
        "a stalled saver is given up",
        [
            Edit(
                Collector,
                "_give_up_stale",
                """
                - if create_once(self._backend, pin.ref_key, Tombstone.ABORTED.value) is not None:
                + if False:
                """,
            )
        ],
    ),
    "a stale save that was committed after all counts": Rule(
        "a stalled saver that uses garbage is given up",
        [
            Edit(
                Collector,
                "_give_up_stale",
                """
                - if create_once(self._backend, pin.ref_key, Tombstone.ABORTED.value) is not None:
                + create_once(self._backend, pin.ref_key, Tombstone.ABORTED.value)
                + if False:
                """,
            )
        ],
    ),
    "a list is removed after its keys are deleted": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                Collector,
                "finish",
                """
                - if collected.deleted:
                + self._backend.delete([self._store.condemned.key(name) for name in done])
                + if collected.deleted:
                """,
            )
        ],
    ),
    "a list is put once": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                refs.CondemnedLists,
                "put",
                """
                - condemned = frozenset(keys)
                + condemned = frozenset(keys)
                + try:
                +     self._backend.put(self.key(name), dump_document("condemned", {"keys": []}))
                + except BackendError:
                +     pass
                """,
            )
        ],
    ),
    "a list of others is removed only when none of its keys exists": Rule(
        "two runs of one content, one pruned",
        [
            Edit(
                Collector,
                "plan",
                """
                - still = {name: keys & there.keys() for name, keys in others.items()}
                + still = {name: frozenset() for name, keys in others.items()}
                """,
            )
        ],
    ),
    "what others have condemned goes on an own list": Rule(
        "a pruner, a saver and a collector",
        [
            Edit(
                Collector,
                "carry_out",
                """
                - self._over = []
                + self._over = []
                + condemned = {removal.name for removal in plan.of(Reason.CONDEMNED)}
                + self._backend.delete(condemned)
                + plan = replace(plan, removals=tuple(r for r in plan.removals if r.name not in condemned))
                """,
            )
        ],
    ),
    "pins of failed saves stay until what they have put is on a list": Rule(
        "a lone writer that prunes, badly connected",
        [
            Edit(
                Attempt,
                "_tidy",
                """
                - return
                + self._discards.delete_spent()
                + return
                """,
            )
        ],
        {"faults": 2, "faulty": ("dropped", "lost"), "faulty_at": ("objects/", "gc/")},
    ),
    # -- answers that are wrong, and damage
    "a value is read again before it counts as damaged": Rule(
        "a restart, and one wrong answer",
        [
            Edit(
                rereading,
                "reread",
                """
                - if damaged == TRIES:
                + if True:
                """,
            )
        ],
    ),
    "a key is looked for again before it counts as absent": Rule(
        "a restart, and one wrong answer",
        [
            Edit(
                rereading,
                "reread",
                """
                - if absent == _ABSENT_TRIES:
                + if True:
                """,
            )
        ],
    ),
    "a run is empty only if two looks agree": Rule(
        "a restart, and one wrong answer",
        [
            Edit(
                Run,
                "lineage",
                """
                - if (sealed, listed) == before:
                + if True:
                """,
            )
        ],
    ),
    "refs that no lineage explains are damage": Rule(
        "damage before or during a restart",
        [
            Edit(
                Run,
                "lineage",
                """
                - if latest > sealed:
                + if False:
                """,
            )
        ],
    ),
    "a ref that did not show at the restore is not left out": Rule(
        "a restart, and one wrong answer",
        [
            Edit(
                Run,
                "standing",
                """
                - newer = [name for name in standing - seen.seen if name.attempt <= seen.sealed]
                + newer = [name for name in standing - seen.seen if name.attempt == seen.attempt]
                """,
            )
        ],
    ),
    "what an attempt leaves out, two listings leave out": Rule(
        "a restart, and one wrong answer",
        [
            Edit(
                Run,
                "standing",
                """
                - refs = list_refs(self.backend, self.name, twice=True)
                + refs = list_refs(self.backend, self.name)
                """,
            )
        ],
    ),
    "what an appending attempt leaves out, two listings leave out": Rule(
        "a writer that appends, and one wrong answer",
        [
            Edit(
                Attempt,
                "_chosen",
                """
                - lineage = self._run.lineage(twice=True)
                + lineage = self._run.lineage()
                """,
            )
        ],
        {"switches": 2, "seed": 1},
    ),
    "who takes a run over lists its pins twice": Rule(
        "a writer and its replacement, and one wrong answer",
        [
            Edit(
                Run,
                "start_attempt",
                """
                - pins = list_pins(self.backend, self.name, twice=True)
                + pins = list_pins(self.backend, self.name)
                """,
            )
        ],
    ),
    "a pin that was put is looked for": Rule(
        "two runs of one content, one pruned, and one wrong answer",
        [
            Edit(
                Writer,
                "_look_around",
                """
                - if self._store.backend.remote:
                + if False:
                """,
            )
        ],
        {"seed": 1},
    ),
    "pins are listed twice before anything is deleted": Rule(
        "two runs of one content, one pruned, and one wrong answer",
        [
            Edit(
                Collector,
                "_pins",
                """
                - pins = list_pins(self._backend, twice=twice)
                + pins = list_pins(self._backend)
                """,
            )
        ],
    ),
    "refs are listed twice before anything is deleted": Rule(
        "two runs of one content, one pruned, and one wrong answer",
        [
            Edit(
                Collector,
                "_pins",
                """
                - existing = self._look(twice=twice)
                + existing = self._look()
                """,
            )
        ],
        {"switches": 2, "lying_at": ("refs/",), "seed": 4},
    ),
    "a condemned list that was put is looked for": Rule(
        "two runs of one content, one pruned, and one wrong answer",
        [
            Edit(
                Collector,
                "finish",
                """
                - renewed = self._renew_lost_lists()
                + renewed = frozenset()
                """,
            )
        ],
        {"switches": 2, "lying_at": ("gc/",)},
    ),
    "what is condemned is read twice where no ref vouches": Rule(
        "two runs of one content, one pruned, and one wrong answer",
        [
            Edit(
                Uploader,
                "_surely_condemned",
                """
                - if not known.sure and self._store.backend.remote:
                + if False:
                """,
            )
        ],
        {"switches": 2, "lying_at": ("gc/",)},
    ),
    "a recovery continues what was committed until its attempt began": Rule(
        "damage, and a recovery beside the run's writer",
        [
            Edit(
                Recoverer,
                "carry_out",
                """
                - done, chosen = self._plan(self._look({name: one for name, one in found.checked.items() if not one.lost}))
                + done, chosen = self._plan(found)
                """,
            )
        ],
        {"seed": 0},
    ),
    "a writer lists what it put in vain": Rule(
        "two replacements at once",
        [
            Edit(
                Attempt,
                "_condemn_wasted",
                """
                - self._collector.condemn_keys(self._discards.wasted)
                + pass
                """,
            )
        ],
    ),
    # -- tiers
    "what waits to be copied is kept locally": Rule(
        "a machine that copies what it prunes",
        [
            Edit(
                Copies,
                "keep",
                """
                - return {item.ref.step for item in (*self._waiting, self._under_way, self._failed) if item is not None}
                + return {item.ref.step for item in (self._under_way, self._failed) if item is not None}
                """,
            )
        ],
    ),
    "what is being copied is kept locally": Rule(
        "a machine that copies what it prunes",
        [
            Edit(
                Copies,
                "keep",
                """
                - return {item.ref.step for item in (*self._waiting, self._under_way, self._failed) if item is not None}
                + return {item.ref.step for item in (*self._waiting, self._failed) if item is not None}
                """,
            )
        ],
        {"switches": 2},
    ),
    "the local tier names the attempt before that commits in the bucket": Rule(
        "a machine that copies what it prunes",
        [
            Edit(
                TieredPosition,
                "_take_bucket_over",
                """
                - self._put_follows(Follows(self._store.id, attempt, str(self._bucket.latest or "")))
                + pass
                """,
            )
        ],
    ),
    "the local tier names what that attempt goes on from": Rule(
        "a machine that copies, its bucket badly connected",
        [
            Edit(
                TieredPosition,
                "_take_bucket_over",
                """
                - self._put_follows(Follows(self._store.id, attempt, str(self._bucket.latest or "")))
                + self._put_follows(Follows(self._store.id, attempt, follows.latest))
                """,
            )
        ],
        {"faulty": ("dropped",), "faulty_at": ("bucket/refs/",), "seed": 1},
    ),
    "the local tier names what it goes on from before its first save": Rule(
        "a machine taken for dead, and another that goes on from the bucket",
        [
            Edit(
                TieredPosition,
                "_write_locally",
                """
                - self._put_follows(_followed(self._sight.bucket, self._follows, self._store))
                + pass
                """,
            )
        ],
        {"seed": 5},
    ),
    "who goes back abandons the later ones in the bucket first": Rule(
        "a machine goes back to an earlier checkpoint",
        [
            Edit(
                TieredPosition,
                "_write_locally",
                """
                - self._go_back(self._sight.bucket)
                + pass
                """,
            )
        ],
    ),
    "a bucket that was written from elsewhere counts": Rule(
        "a machine comes back, and the bucket was written from elsewhere",
        [
            Edit(
                Follows,
                "continues",
                """
                - return latest is None or str(latest) == self.latest or latest.attempt == self.attempt
                + return latest is None or latest is not None
                """,
            )
        ],
    ),
    "what was copied from here is no other's": Rule(
        "a machine that copies what it prunes",
        [
            Edit(
                Follows,
                "continues",
                """
                - return latest is None or str(latest) == self.latest or latest.attempt == self.attempt
                + return latest is None or str(latest) == self.latest
                """,
            )
        ],
    ),
    "what the bucket does not give is not passed over": Rule(
        "a machine comes back, and cannot reach the bucket",
        [
            Edit(
                TieredPosition,
                "read",
                """
                - if isinstance(error, BackendError) and not is_local:
                + if False:
                """,
            )
        ],
        {"seed": 0},
    ),
    "a bucket out of reach is asked, once it can be, whether it was written from elsewhere": Rule(
        "a machine comes back, and cannot reach the bucket",
        [
            Edit(
                TieredPosition,
                "_place_in_bucket",
                """
                - if not follows.continues(sight.bucket):
                + if False:
                """,
            )
        ],
        {"seed": 3},
    ),
    "whom the bucket refuses saves no more": Rule(
        "a machine taken for dead, and another that goes on from the bucket",
        [
            Edit(
                TieredPosition,
                "check_step",
                """
                - self.copies.raise_superseded()
                + pass
                """,
            )
        ],
    ),
    "a newest copy that failed for good is an error at the end": Rule(
        "a machine that copies, its bucket badly connected",
        [
            Edit(
                Copies,
                "stop",
                """
                - if self._failed is not None:
                + if False:
                """,
            )
        ],
        {"faults": 2, "faulty": ("dropped",), "faulty_at": ("bucket/pins/",)},
    ),
    "nothing is copied any more before the bucket is saved to directly": Rule(
        "a machine's disk fails",
        [
            Edit(
                TieredPosition,
                "write",
                """
                - self.copies.drop()
                + pass
                """,
            )
        ],
        {"faulty_at": ("a/pins/",)},
    ),
}


@contextmanager
def without(name: str) -> Iterator[None]:
    """Take a rule away for a while.

    Raises
    ------
    EditError
        If it quotes what is not there any more.
    """
    with ExitStack() as stack:
        try:
            for edit in RULES[name].without:
                stack.enter_context(edit.made())
        except EditError as error:
            raise EditError(
                f"rule {name!r} quotes what is not there; update it if the rule still holds: {error}"
            ) from None
        yield
