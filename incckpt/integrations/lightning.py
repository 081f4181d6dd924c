"""Lightning: `IncrementalCheckpointIO` keeps the checkpoints of a ``Trainer`` or ``Fabric`` in a store.

Where Lightning expects a checkpoint file there is a small file that names a checkpoint of the store.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

import torch

from incckpt.errors import CheckpointNotFoundError, OptionError, SaveError, StateMismatchError, StoreNotFoundError
from incckpt.inspection.listing import list_checkpoints
from incckpt.integrations._files import file_exists, make_folder, remove_file
from incckpt.integrations._lightning_rng import RandomState
from incckpt.integrations._pointer import (
    Place,
    Pointer,
    place_of,
    read_pointer,
    read_state,
    store_name,
    write_pointer,
)
from incckpt.manager import CheckpointManager
from incckpt.retention import Record
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.restore import MapLocation
from incckpt.store.location import locate
from incckpt.threads import Future

try:
    from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
    from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
except ImportError:  # the same by another name
    from lightning_fabric.plugins.io.checkpoint_io import CheckpointIO
    from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO

__all__ = ["IncrementalCheckpointIO", "RandomState", "load_checkpoint", "load_from_checkpoint"]

log = logging.getLogger(__name__)

_Module = TypeVar("_Module")

_OWN = "incckpt"  # the key of what is ours in a checkpoint
_FOR_READING = ("allow_pickle", "max_bytes", "metric", "mode", "storage_options", "threads", "verify")
_DECIDED_HERE = ("keep_last_n", "keep_best_n", "retention", "read_only", "run")


class IncrementalCheckpointIO(CheckpointIO):
    """A ``CheckpointIO`` plugin: what changed goes into the store, in the background; files name what is there.

    Every checkpoint that Lightning saves becomes one of the run, at the step ``checkpoint["global_step"]``, and the
    file at its path names it. Which are kept is Lightning's affair: when it removes the last file of a checkpoint,
    the checkpoint goes once a later one is committed. A run has one checkpoint of a step: if Lightning saves twice at
    one step, the second replaces the first, and both files name it.

    ``ckpt_path=`` may be a file or a URL, such as ``s3://bucket/exp7#run@500``; files that ``torch.save`` wrote are
    read as well. Going on from an earlier checkpoint abandons those after it, see `CheckpointManager.restore`.
    Reading, for tests, say, takes no run over.

    Parameters
    ----------
    url
        Of the store; the run may be its fragment, as in ``s3://bucket/sweep#lr3e-4``.
    step_key
        Where Fabric's state has the step. Without it, a checkpoint gets the step after the run's latest.
    options
        For the `CheckpointManager`, apart from those that say what is kept.

    Raises
    ------
    OptionError
        If an option is not usable.

    Examples
    --------
    >>> checkpoints = IncrementalCheckpointIO("s3://bucket/exp7")  # doctest: +SKIP
    >>> trainer = Trainer(plugins=[checkpoints])  # doctest: +SKIP
    >>> trainer.fit(model, ckpt_path=checkpoints.latest)  # doctest: +SKIP
    """

    def __init__(self, url: str | os.PathLike[str], *, step_key: str = "global_step", **options: Any) -> None:
        location = locate(url)
        if location.step is not None:
            raise OptionError(f"{url}: a plugin writes a whole run; give what to load as ckpt_path=, not here")
        for option in _DECIDED_HERE:
            if option in options:
                advice = "name it in the URL: store#run" if option == "run" else "Lightning decides what is kept"
                raise OptionError(f"{option} is no option of IncrementalCheckpointIO: {advice}")
        self._url = url
        self._step_key = step_key
        self._options = options
        self._store, self._run = location.store, location.run
        self._name = store_name(location.store)
        self._manager: CheckpointManager | None = None
        self._begins = False  # whether the next save is this manager's first
        self._lock = threading.RLock()
        self._steps: dict[str, int] = {}  # by path, of the files that Lightning has not removed
        self._saving: dict[str, Future[Checkpoint]] = {}  # by path, as long as its file names nothing that is committed
        self._lost: dict[int, int] = {}  # steps that lost a file, and the step that was saved last by then
        self._submitted = -1  # the step of the last save
        self._latest: int | None = None  # the step of the latest checkpoint that is known to be committed
        self._loaded: Checkpoint | None = None  # what was loaded last, until a save has gone on from it
        self._failure: Exception | None = None  # of what is done once a save is committed

    def __reduce__(self) -> Any:  # for strategies that start processes
        return partial(IncrementalCheckpointIO, step_key=self._step_key, **self._options), (self._url,)

    @property
    def latest(self) -> str | None:
        """The URL of the run's latest checkpoint, for ``ckpt_path=``; ``None`` if there is none yet."""
        self.wait()
        try:
            there = list_checkpoints(self._store, run=self._run, storage_options=self._options.get("storage_options"))
        except (StoreNotFoundError, CheckpointNotFoundError):
            return None
        return f"{self._store}#{self._run}@{there[-1].step}" if there else None

    # -- saving

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Save a checkpoint; return when the training may go on. See `CheckpointManager.save` for what it raises."""
        _refuse_wrapped()
        if storage_options is not None:
            raise OptionError("storage_options belong to the plugin: IncrementalCheckpointIO(url, storage_options=…)")
        self._raise_failure()
        path = _normal(path)
        make_folder(path)  # at once: ModelCheckpoint makes links in it
        manager = self._open()
        step = self._step_of(checkpoint, manager)
        self._go_on(manager, step)
        with self._lock:
            self._lose(path, before=step)
            self._steps[path] = step
            own = {"format": 1, "files": self._steps.copy()}
        # One that has the weights alone must not replace one that has everything.
        partial_one = "pytorch-lightning_version" in checkpoint and "optimizer_states" not in checkpoint
        saved = manager.save(
            step,
            {**checkpoint, _OWN: own},
            self._metrics(checkpoint, step),
            if_exists="skip" if partial_one else "replace",
        )
        with self._lock:
            self._submitted = step
            self._saving[path] = saved
            if self._latest is not None:  # so that there is something to fall back to
                write_pointer(path, Pointer(self._name, self._run, step))
        saved.add_done_callback(partial(self._committed, path))

    def _open(self) -> CheckpointManager:
        if self._manager is None:
            self._manager = CheckpointManager(self._url, retention=self._kept, **self._options)
            self._begins = True
            latest = self._manager.latest
            self._latest = None if latest is None else latest.step
        return self._manager

    def _step_of(self, checkpoint: Mapping[str, Any], manager: CheckpointManager) -> int:
        step = checkpoint.get(self._step_key)
        if step is not None:
            return int(step)
        manager.wait()
        latest = manager.latest
        return 0 if latest is None else latest.step + 1

    def _go_on(self, manager: CheckpointManager, step: int) -> None:
        """Before a save at `step`, go back to what was loaded if the run is further than that."""
        loaded, self._loaded = self._loaded, None
        begins, self._begins = self._begins, False
        latest = manager.latest if begins or loaded is not None else None
        if latest is None or latest.step < step or latest == loaded:
            return
        if loaded is not None:
            manager.load(loaded.ref, keys=f"{_OWN}.*")  # goes on from there, in a moment
        elif latest.step > step:
            raise OptionError(
                f"run {self._run!r} at {self._name} is at step {latest.step} already, and this training, now at step "
                f"{step}, was not resumed from it: give fit() ckpt_path={self._name}#{self._run}@{latest.step} to go "
                f"on, or this plugin a run of its own, as in {self._name}#second-try"
            )

    def _metrics(self, checkpoint: Mapping[str, Any], step: int) -> dict[str, float]:
        """Return what ``ModelCheckpoint``s monitor, as it was at `step`."""
        metrics: dict[str, float] = {}
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, Mapping) and isinstance(state.get("monitor"), str):
                for path, score in (state.get("best_k_models") or {}).items():
                    if self._steps.get(_normal(path)) == step:
                        metrics[state["monitor"]] = float(score)
        return metrics

    def _committed(self, path: str, saved: Future[Checkpoint]) -> None:
        """Let the files of a checkpoint name it, now that it is there; called by the thread that saves."""
        if saved.exception() is not None:
            return  # logged, and raised by the next save
        checkpoint = saved.result()
        with self._lock:
            self._latest = max(checkpoint.step, -1 if self._latest is None else self._latest)
            if self._saving.get(path) is not saved:
                return
            del self._saving[path]
            try:
                for name, step in self._steps.items():
                    if step == checkpoint.step and name not in self._saving:
                        write_pointer(name, Pointer(self._name, self._run, step, checkpoint.ref))
            except OSError as error:
                log.error("step %d is saved, but the file that names it cannot be written: %s", checkpoint.step, error)
                self._failure = error

    # -- removing

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint's file now, and the checkpoint once a later one is committed."""
        path = _normal(path)
        with self._lock:
            step = self._steps.get(path)
            self._saving.pop(path, None)
            try:
                pointer = read_pointer(path)
            except FileNotFoundError:
                pointer = None
            else:
                if pointer is None:
                    TorchCheckpointIO().remove_checkpoint(path)
                    return
            remove_file(path)
            if step is None and pointer is not None and (pointer.store, pointer.run) == (self._name, self._run):
                step = pointer.step
            if step is not None:
                self._steps[path] = step
                self._lose(path, before=self._submitted)

    def _lose(self, path: str, *, before: int) -> None:
        """Note that the file at `path` names its checkpoint no more; a save of step `before` takes over from it."""
        step = self._steps.pop(path, None)
        if step is not None:
            self._lost[step] = before

    def _unnamed(self, latest: int) -> set[int]:
        """Return the steps that no file names, now that `latest` is committed."""
        with self._lock:
            named = set(self._steps.values())
            return {step for step, before in self._lost.items() if before <= latest and step not in named}

    def _kept(self, history: Sequence[Record]) -> Iterable[int]:
        unnamed = self._unnamed(max(record.step for record in history))
        return [record.step for record in history if record.step not in unnamed]

    # -- loading

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: MapLocation = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the checkpoint that a file or URL names.

        Raises
        ------
        StoreNotFoundError, CheckpointNotFoundError
            If there is no such file, store or checkpoint.
        CorruptionError, FormatError
            If it is damaged.
        """
        self.wait()
        place = self._place(path)
        if place is None:
            return _read_with_torch(path, map_location, weights_only)
        options = {key: value for key, value in self._options.items() if key in _FOR_READING}
        found, checkpoint = read_state(place, map_location=map_location, **options)
        state = _checked(found, path)
        own = state.pop(_OWN, {})
        if (store_name(place.store), place.run) == (self._name, self._run):
            with self._lock:
                self._loaded = checkpoint
                self._steps = own.get("files", {}) | self._steps
        return state

    def _place(self, path: str | os.PathLike[str]) -> Place | None:
        name = _normal(path)
        if name in self._steps and not file_exists(name):  # it was left on another machine
            return Place(self._store, self._run, self._steps[name])
        place = place_of(path)
        if place is not None and (store_name(place.store), place.run) == (self._name, self._run):
            return replace(place, store=self._store)  # with the secrets that no file holds
        return place

    # -- the end

    def wait(self) -> None:
        """Wait until every checkpoint is committed, and its file names it.

        Raises
        ------
        OSError
            If a file could not be written.
        """
        if self._manager is not None:
            self._manager.wait()
        self._raise_failure()

    def teardown(self) -> None:
        """Finish what is pending; Lightning calls it at the end of ``fit``. Saving again starts anew.

        Raises
        ------
        SaveError, SupersededError
            If a save failed and no call has reported it yet.
        """
        manager, self._manager = self._manager, None
        if manager is None:
            return
        with manager:
            manager.wait()
            self._saving.clear()
            if self._submitted == self._latest:  # else the last save failed, and what it was to take over from stays
                for step in sorted(self._unnamed(self._submitted) - {self._submitted}):
                    manager.delete(step)
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise SaveError(f"the file of an earlier checkpoint could not be written: {failure}") from failure


if CheckpointIO.__module__.startswith("lightning."):
    with suppress(ImportError):  # pytorch_lightning, the same by another name, asks for a class of its own
        import_module("lightning_fabric.plugins.io.checkpoint_io").CheckpointIO.register(IncrementalCheckpointIO)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = "cpu",
    allow_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the checkpoint that a file, or a URL such as ``s3://bucket/exp7#run@500``, names.

    Parameters
    ----------
    path
        A file of `IncrementalCheckpointIO` or of Lightning's own, or a URL.
    map_location
        As for ``torch.load``.
    allow_pickle
        Whether to unpickle what was pickled at save. Only for stores that you trust.
    storage_options
        For fsspec.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError
        If there is no such file, store or checkpoint.
    CorruptionError, FormatError
        If it is damaged.
    """
    place = place_of(path)
    if place is None:
        return _read_with_torch(path, map_location, weights_only=not allow_pickle)
    found, _ = read_state(place, map_location=map_location, allow_pickle=allow_pickle, storage_options=storage_options)
    state = _checked(found, path)
    state.pop(_OWN, None)
    return state


def load_from_checkpoint(
    module: type[_Module],
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = "cpu",
    allow_pickle: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> _Module:
    """Do what ``module.load_from_checkpoint(path)`` does, for a file or URL that names a checkpoint in a store.

    Parameters
    ----------
    module
        A ``LightningModule`` or ``LightningDataModule`` class.
    path, map_location, allow_pickle, storage_options
        As for `load_checkpoint`.
    options
        ``strict``, ``hparams_file``, and arguments of the class in place of the saved hyperparameters.

    Raises
    ------
    StoreNotFoundError, CheckpointNotFoundError, CorruptionError, FormatError
        See `load_checkpoint`.
    """
    state = load_checkpoint(path, map_location=map_location, allow_pickle=allow_pickle, storage_options=storage_options)
    for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks"):  # what a module alone has no use for
        state.pop(key, None)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    load: Any = module.load_from_checkpoint  # type: ignore[attr-defined]
    if "weights_only" in inspect.signature(load).parameters:
        options = {"weights_only": False} | options  # these bytes were written here
    loaded: _Module = load(file, map_location=map_location, **options)
    return loaded


def _checked(state: Any, path: object) -> dict[str, Any]:
    if isinstance(state, dict):
        return state
    raise StateMismatchError(f"{path} is no checkpoint of Lightning but a {type(state).__name__}; see incckpt.load")


def _read_with_torch(
    path: str | os.PathLike[str], map_location: MapLocation, weights_only: bool | None
) -> dict[str, Any]:
    read: Any = TorchCheckpointIO().load_checkpoint
    options = {"weights_only": weights_only} if "weights_only" in inspect.signature(read).parameters else {}
    checkpoint: dict[str, Any] = read(path, map_location=map_location, **options)
    return checkpoint


def _normal(path: str | os.PathLike[str]) -> str:
    """Return one text for a path, however it is written."""
    text = os.fspath(path)
    return text if "://" in text else os.path.abspath(text)


def _refuse_wrapped() -> None:
    """Refuse to be called by ``AsyncCheckpointIO``, whose removals overtake its saves."""
    frame = sys._getframe(2)
    for _ in range(3):
        if frame.f_globals.get("__name__", "").endswith(".io.async_plugin"):
            raise OptionError(
                "AsyncCheckpointIO around IncrementalCheckpointIO would remove checkpoints before later ones are "
                "saved; give the Trainer IncrementalCheckpointIO alone, it saves in the background anyway"
            )
        if frame.f_back is None:
            return
        frame = frame.f_back
