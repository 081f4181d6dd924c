"""A checkpoint that several processes save: the coordinator puts the pin, gathers what each has stored, and commits.

The save itself is `Attempt.write`, in a thread of its own, which waits between the pin and the manifest for the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from incckpt.errors import SaveError
from incckpt.run.attempt import Attempt, IfExists
from incckpt.run.merging import Merged
from incckpt.run.report import SaveReport
from incckpt.run.upload import Known, Uploader
from incckpt.store.manifest import Chunk, Manifest
from incckpt.store.refs import Ref, RefName

__all__ = ["JointSave", "OpenSave"]


@dataclass(frozen=True)
class JointSave:
    """What several processes save, as `Attempt.write` takes it.

    Attributes
    ----------
    step, time, metrics
        As of any save.
    meeting
        Where the writer waits for the others.
    """

    step: int
    time: float
    metrics: Mapping[str, float]
    meeting: _Meeting = field(repr=False)

    def store(self, uploader: Uploader, nonce: str, known: Known, report: SaveReport) -> Sequence[Chunk]:
        """Wait until every process has stored its part; return where each chunk is stored.

        Raises
        ------
        SaveError
            If a process has failed, or the save was aborted as stale and would have to begin again.
        """
        merged = self.meeting.wait(uploader.tried)
        report.put_objects += merged.put_objects
        report.put_bytes += merged.put_bytes
        report.chunks, report.nbytes = len(merged.chunks), merged.chunks.nbytes
        return merged.chunks

    def manifest_as(self, run: str, name: RefName, chunks: Sequence[Chunk]) -> Manifest:
        """Return the manifest.

        Raises
        ------
        StateError
            If no reader would accept it.
        """
        merged = self.meeting.merged
        assert merged is not None
        return merged.manifest(run, name, self.time, self.metrics)


class _Meeting:
    """Where the thread that saves and the one that speaks for the processes meet."""

    def __init__(self) -> None:
        self.merged: Merged | None = None
        self._changed = threading.Condition()
        self._ready = False
        self._done = False
        self._error: BaseException | None = None
        self._tried: Sequence[str] = ()

    def wait(self, tried: list[str]) -> Merged:
        """In the thread that saves: say that the pin is put, and wait for the parts. Add to `tried` what was put."""
        with self._changed:
            if self._ready:
                tried += self._tried
                raise SaveError("a collector took this save for dead and aborted it; save again")
            self._ready = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._done)
            tried += self._tried
            if self._error is not None:
                raise self._error
            assert self.merged is not None
            return self.merged

    def wait_until_ready(self, over: Callable[[], bool]) -> bool:
        """Wait until the pin is put; return whether it is, or the save is `over`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or over())
            return self._ready

    def end(self, merged: Merged | None, error: BaseException | None, tried: Sequence[str]) -> None:
        """Give what the processes have stored, or say why they have not."""
        with self._changed:
            self.merged, self._error, self._tried, self._done = merged, error, tried, True
            self._changed.notify_all()

    def notify(self) -> None:
        """Wake who waits."""
        with self._changed:
            self._changed.notify_all()


class OpenSave:
    """A save in flight whose pin is put.

    Parameters
    ----------
    attempt
        Of the coordinator.
    step, time, metrics, if_exists
        As for any save.

    Raises
    ------
    IncckptError
        If the save cannot begin; nothing is left of it.
    """

    def __init__(
        self, attempt: Attempt, step: int, time: float, metrics: Mapping[str, float], if_exists: IfExists
    ) -> None:
        self.report = SaveReport(step=step)
        self._attempt = attempt
        self._meeting = _Meeting()
        self._save = JointSave(step, time, metrics, self._meeting)
        self._if_exists: IfExists = if_exists
        self._over = False
        self._ref: Ref | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="incckpt-joint", daemon=True)
        self._thread.start()
        if not self._meeting.wait_until_ready(lambda: self._over):
            self._thread.join()
            assert self._error is not None
            raise self._error

    def _write(self) -> None:
        try:
            self._ref = self._attempt.write(self._save, self.report, self._if_exists)
        except BaseException as error:  # noqa: BLE001 -- raised again in the thread that speaks for the processes
            self._error = error
        finally:
            self._over = True
            self._meeting.notify()

    def commit(self, merged: Merged, tried: Sequence[str]) -> Ref:
        """Commit what the processes have stored.

        Parameters
        ----------
        tried
            Keys that they have put or tried to put.

        Raises
        ------
        IncckptError
            If the checkpoint was not committed.
        """
        self._meeting.end(merged, None, tried)
        self._thread.join()
        if self._error is not None:
            self._attempt.give_up()
            raise self._error
        assert self._ref is not None
        return self._ref

    def abort(self, error: BaseException, tried: Sequence[str] = ()) -> None:
        """Give the save up because of `error`, and remove its pin; the next save sweeps what it left."""
        self._meeting.end(None, error, tried)
        self._thread.join()
        self._attempt.give_up()
