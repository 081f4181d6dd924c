"""Accelerate: what an ``Accelerator`` prepared, saved to a store and restored."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsIndex

import torch

from incckpt.errors import DistributedError, OptionError, StateMismatchError, StoreNotFoundError
from incckpt.integrations._pointer import Place, Pointer, find, place_of, store_name, write_pointer
from incckpt.manager import CheckpointManager
from incckpt.retention import KeepLast
from incckpt.run.attempt import IfExists
from incckpt.run.checkpoint import Checkpoint
from incckpt.run.choose import Which
from incckpt.state.rng import RngState
from incckpt.store.location import locate
from incckpt.threads import Future

try:
    from accelerate.utils import broadcast_object_list, gather_object
except ImportError as error:
    raise ImportError('accelerate is not installed: pip install "incckpt[accelerate]"') from error

__all__ = ["IncrementalState", "install"]

log = logging.getLogger(__name__)

_POINTER = "checkpoint.json"  # in the folders of save_state

_WHOLE = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_MLU", "MULTI_NPU", "MULTI_HPU")  # every rank has all


def install(accelerator: Any, url: str | os.PathLike[str], **options: Any) -> IncrementalState:
    """Let ``accelerator.save_state`` and ``load_state`` save to a store and load from it.

    Scripts stay as they are. ``save_state(folder)`` makes the folder, with a small file that names the checkpoint;
    ``load_state`` takes such a folder or a URL, and without either, under automatic naming, the run's latest
    checkpoint, which needs no folder. Saves are numbered as ``accelerator.save_iteration`` says, which is the step of
    the checkpoint, and loading sets to what follows. With automatic naming, ``total_limit`` checkpoints are kept;
    otherwise what `options` say. ``end_training`` finishes what is pending.

    Parameters
    ----------
    accelerator, url, options
        As for `IncrementalState`.

    Returns
    -------
    IncrementalState
        To wait for saves, or to close.

    Raises
    ------
    OptionError
        If an option is not usable.
    DistributedError
        See `IncrementalState`.

    Examples
    --------
    >>> accelerator = Accelerator()  # doctest: +SKIP
    >>> install(accelerator, "s3://bucket/exp7")  # doctest: +SKIP
    """
    configuration = accelerator.project_configuration
    limit = configuration.total_limit if configuration.automatic_checkpoint_naming else None
    if limit is not None:
        if "keep_last_n" in options or "retention" in options:
            raise OptionError(f"total_limit={limit} says what is kept already; give no other policy")
        options["retention"] = KeepLast(limit)
    state = IncrementalState(accelerator, url, **options)
    _Installed(accelerator, state, limit)
    return state


class IncrementalState:
    """The checkpoints of what an ``Accelerator`` prepared and registered, in a store.

    Models, optimizers, schedulers and registered objects, the gradient scaler, gradients accumulated so far, the
    random number generators of every rank and the position of the data loaders: all that resuming exactly needs.
    Models are saved under their own names, without what DDP and ``torch.compile`` wrap around them.

    With several processes every one of them calls `save` and `load`; the main process writes.

    Parameters
    ----------
    accelerator
        What it has prepared when `save` or `load` is called, belongs to the state.
    url
        Of the store; the run may be its fragment, as in ``s3://bucket/sweep#lr3e-4``.
    options
        For the `CheckpointManager`.

    Raises
    ------
    OptionError
        If an option is not usable.
    DistributedError
        If each process has only a part of the model: with FSDP, DeepSpeed or Megatron-LM.

    Examples
    --------
    >>> checkpoints = IncrementalState(accelerator, "s3://bucket/exp7", keep_last_n=3)  # doctest: +SKIP
    >>> start = checkpoints.load() or 0  # doctest: +SKIP
    >>> checkpoints.save(step)  # doctest: +SKIP
    """

    def __init__(self, accelerator: Any, url: str | os.PathLike[str], **options: Any) -> None:
        kind = accelerator.distributed_type.name
        if kind not in _WHOLE:
            raise DistributedError(
                f"with {kind} no process has the whole model: save with torch.distributed.checkpoint through "
                "incckpt.integrations.dcp"
            )
        location = locate(url)
        if location.step is not None:
            raise OptionError(f"{url}: a whole run is written; give the step to load(), not in the URL")
        self.url = url
        self._accelerator = accelerator
        reading = {} if accelerator.is_main_process else {"read_only": True}
        self._manager = CheckpointManager(url, **options | reading)
        self._said: set[str] = set()

    @property
    def latest(self) -> Checkpoint | None:
        """The run's latest checkpoint; ``None`` if there is none."""
        try:
            return self._manager.latest
        except StoreNotFoundError:
            return None

    # -- saving and loading

    def save(
        self,
        step: SupportsIndex,
        metrics: Mapping[str, float] | None = None,
        *,
        if_exists: IfExists = "error",
    ) -> Future[Checkpoint] | None:
        """Save a checkpoint; return when the training may go on.

        Parameters
        ----------
        step, metrics, if_exists
            As for `CheckpointManager.save`, which also says what is raised.

        Returns
        -------
        Future[Checkpoint] or None
            See `CheckpointManager.save`; ``None`` on other processes than the main one.

        Raises
        ------
        StateMismatchError
            If a data loader that is to be stateful has no state.
        """
        ranks = _gathered(self._accelerator, self._of_this_rank())
        if not self._accelerator.is_main_process:
            return None
        state = self._shared() | {"ranks": ranks, "accumulated": self._gradients()}
        return self._manager.save(step, state, metrics, if_exists=if_exists)

    def load(self, step: Which | None = None) -> int | None:
        """Restore a checkpoint, in place, and go on from it.

        Parameters
        ----------
        step
            As for `CheckpointManager.restore`, which also says what is raised.

        Returns
        -------
        int or None
            The step restored; ``None`` if the run has no checkpoint yet and no step was asked for.

        Raises
        ------
        StateMismatchError
            If the checkpoint was made with other models, optimizers or loaders than are prepared now.
        """
        chosen = self._choose(step)
        if chosen is None:
            return None
        own = self._manager.load(chosen, keys=("accelerator.*", "ranks*", "accumulated*"))
        restored = self._manager.restore(self._shared(), chosen, ignore=("accelerator.*", "ranks*", "accumulated*"))
        self._accelerator.step = own["accelerator"]["step"]
        self._accelerator.project_configuration.iteration = own["accelerator"]["iteration"]
        self._set_gradients(own.get("accumulated", []), own["accelerator"]["accumulating"])
        self._set_this_rank(own["ranks"])
        return restored

    def _choose(self, step: Which | None) -> Which | None:
        """Return the exact name of the checkpoint to load, the same on every process."""
        found: list[Any] = [None]
        if self._accelerator.is_main_process and step is None:
            self._manager.wait()
            latest = self.latest
            found = [None if latest is None else latest.ref]
        elif self._accelerator.is_main_process:
            found = [step]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(found)
        chosen: Which | None = found[0]
        return chosen

    def find(self, place: Place) -> str | None:
        """Return the exact name of the checkpoint at a place in the run; ``None`` on other processes than the main."""
        if not self._accelerator.is_main_process:
            return None
        self._manager.wait()
        return find(self._manager, place).ref

    def _shared(self) -> dict[str, Any]:
        """Return what all processes have in common."""
        accelerator = self._accelerator
        state: dict[str, Any] = {
            "models": [unwrapped(model) for model in accelerator._models],
            "optimizers": [getattr(optimizer, "optimizer", optimizer) for optimizer in accelerator._optimizers],
            "schedulers": list(accelerator._schedulers),
            "custom": list(accelerator._custom_objects),
            "accelerator": {
                "step": accelerator.step,
                "iteration": accelerator.project_configuration.iteration,
                "accumulating": not accelerator.sync_gradients,
            },
        }
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler
        return state

    # -- gradients accumulated so far

    def _gradients(self) -> list[dict[str, torch.Tensor]]:
        if self._accelerator.sync_gradients:
            return []
        if self._accelerator.num_processes > 1:
            raise OptionError(
                "gradients are being accumulated, and every process has its own: save where "
                "accelerator.sync_gradients is true"
            )
        return [
            {name: one.grad for name, one in unwrapped(model).named_parameters() if one.grad is not None}
            for model in self._accelerator._models
        ]

    def _set_gradients(self, gradients: list[Mapping[str, torch.Tensor]], accumulating: bool) -> None:
        self._accelerator.gradient_state._set_sync_gradients(not accumulating)
        for model, saved in zip(self._accelerator._models, gradients, strict=False):
            for name, parameter in unwrapped(model).named_parameters():
                grad = saved.get(name)
                parameter.grad = None if grad is None else grad.to(parameter.device)

    # -- what every process has of its own

    def _of_this_rank(self) -> dict[str, Any]:
        loaders = [_loader_state(loader) for loader in self._accelerator._dataloaders]
        for loader in self._accelerator._dataloaders:
            self._say_once(_inexact(loader))
        return {"generators": RngState().state_dict(), "loaders": loaders}

    def _set_this_rank(self, ranks: list[Any]) -> None:
        accelerator = self._accelerator
        if len(ranks) != accelerator.num_processes:
            log.warning(
                "the checkpoint is of %d processes, there are %d now: generators and loaders are not restored",
                len(ranks),
                accelerator.num_processes,
            )
            return
        own = ranks[accelerator.process_index]
        if len(own["loaders"]) != len(accelerator._dataloaders):
            raise StateMismatchError(
                f"the checkpoint has the state of {len(own['loaders'])} data loaders, "
                f"{len(accelerator._dataloaders)} are prepared now: prepare the same, in the same order"
            )
        for loader, state in zip(accelerator._dataloaders, own["loaders"], strict=True):
            _set_loader(loader, state)
        RngState().load_state_dict(own["generators"])

    def _say_once(self, what: str | None) -> None:
        if what is not None and what not in self._said:
            self._said.add(what)
            log.warning("resuming within an epoch will not be exact: %s", what)

    # -- the end

    def wait(self) -> None:
        """Wait until no save is pending."""
        self._manager.wait()

    def close(self) -> None:
        """Finish pending saves; see `CheckpointManager.close` for what it raises."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager.__exit__(exc_type, exc, traceback)


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Return a model without what DDP, ``DataParallel`` and ``torch.compile`` wrap around it."""
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel | torch.nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), torch.nn.Module):
            model = inner
        else:
            return model


def _gathered(accelerator: Any, of_this_rank: Mapping[str, Any]) -> list[Any]:
    if accelerator.num_processes == 1:
        return [of_this_rank]
    gathered: list[Any] = gather_object([of_this_rank])
    return gathered


def _loader_state(loader: Any) -> dict[str, Any]:
    """Return a prepared loader's position: its epoch, and the position within where it is stateful."""
    state: dict[str, Any] = {"iteration": getattr(loader, "iteration", 0)}
    if _is_at_its_end(loader):
        state["iteration"] += 1  # as it does itself, in a moment
    sampler: Any = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if hasattr(sampler, "initial_seed"):
        state["seed"] = sampler.initial_seed
    if getattr(loader, "use_stateful_dataloader", False):
        state["position"] = loader.state_dict()
    return state


def _inexact(loader: Any) -> str | None:
    """Return why a loader cannot be resumed exactly within an epoch; ``None`` if nothing is known."""
    sampler: Any = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if isinstance(sampler, torch.utils.data.RandomSampler) and not hasattr(sampler, "initial_seed"):
        return "a data loader shuffles with what cannot be saved; DataLoaderConfiguration(use_seedable_sampler=True)"
    if getattr(loader, "use_stateful_dataloader", False) and getattr(loader, "num_workers", 0) > 0:
        return "Accelerate resumes a stateful data loader with workers at other batches; num_workers=0"
    if getattr(loader, "use_stateful_dataloader", False) and getattr(loader, "generator", None) is None:
        return (
            "a data loader draws from the global generator when it starts; DataLoader(…, generator=torch.Generator())"
        )
    return None


def _is_at_its_end(loader: Any) -> bool:
    state = getattr(loader, "gradient_state", None)
    return bool(
        getattr(loader, "end_of_dataloader", False)
        and state is not None
        and any(one is loader for one in state.dataloader_references)
    )


def _set_loader(loader: Any, state: Mapping[str, Any]) -> None:
    if hasattr(loader, "iteration"):
        loader.iteration = state["iteration"]
    sampler: Any = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if "seed" in state and hasattr(sampler, "initial_seed"):
        sampler.initial_seed = state["seed"]
    if "position" in state:
        if not getattr(loader, "use_stateful_dataloader", False):
            raise StateMismatchError(
                "the checkpoint has the position of a stateful data loader, and this one has none: "
                "DataLoaderConfiguration(use_stateful_dataloader=True)"
            )
        loader.load_state_dict(state["position"])


class _Installed:
    """``save_state``, ``load_state`` and ``end_training`` of an accelerator, over an `IncrementalState`."""

    def __init__(self, accelerator: Any, state: IncrementalState, limit: int | None) -> None:
        self._accelerator = accelerator
        self._state = state
        self._limit = limit
        self._location = locate(state.url)
        self._end_training = accelerator.end_training
        accelerator.save_state = self.save_state
        accelerator.load_state = self.load_state
        accelerator.end_training = self.end_training

    def save_state(self, output_dir: str | None = None, safe_serialization: bool = True, **options: Any) -> Path:
        """Do what ``Accelerator.save_state`` does; its files' format does not matter."""
        _refuse(options, self._accelerator._save_model_state_pre_hook)
        iteration = self._accelerator.save_iteration
        if self._accelerator.project_configuration.automatic_checkpoint_naming:
            folder = self._automatic() / f"checkpoint_{iteration}"
        elif output_dir is None:
            raise OptionError("save_state needs a folder, unless automatic_checkpoint_naming is on")
        else:
            folder = Path(output_dir)
        pointer = Pointer(store_name(self._location.store), self._location.run, iteration)
        behind = self._state.latest is not None
        saved = self._state.save(iteration)
        self._accelerator.project_configuration.iteration = iteration + 1
        if saved is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if behind:  # there is something to fall back to
                write_pointer(str(folder / _POINTER), pointer)
            saved.add_done_callback(partial(self._committed, folder, pointer))
        return folder

    def _committed(self, folder: Path, pointer: Pointer, saved: Future[Checkpoint]) -> None:
        if saved.exception() is not None:
            return  # logged, and raised by the next save
        write_pointer(str(folder / _POINTER), replace(pointer, ref=saved.result().ref))
        if self._limit is not None:
            for old in _numbered(folder.parent)[: -self._limit]:
                shutil.rmtree(old)

    def load_state(self, input_dir: str | None = None, load_kwargs: Any = None, **options: Any) -> None:
        """Do what ``Accelerator.load_state`` does, from a folder or a URL."""
        options.pop("map_location", None)  # everything is restored where it is
        _refuse(options, self._accelerator._load_model_state_pre_hook)
        automatic = self._accelerator.project_configuration.automatic_checkpoint_naming
        if input_dir is None and not automatic:
            raise OptionError("load_state needs a folder or a URL, unless automatic_checkpoint_naming is on")
        which: Which | None = "latest"
        if input_dir is not None:
            folder = Path(os.path.expanduser(input_dir))
            file = folder / _POINTER
            if folder.is_dir() and not file.is_file() and not (folder / "incckpt.json").is_file():
                raise StoreNotFoundError(
                    f"{folder} names no checkpoint: either save_state was not incckpt's, or it was killed at its first"
                )
            place = place_of(str(file) if file.is_file() else input_dir)
            assert place is not None  # it is a pointer file, or no file
            if (store_name(place.store), place.run) != (store_name(self._location.store), self._location.run):
                raise OptionError(
                    f"{input_dir} is in another store or run than {self._location.store}#{self._location.run}, which "
                    "was given to install: install that one"
                )
            which = self._state.find(place)
        self._state.load(which)
        self._accelerator.project_configuration.iteration += 1  # what follows the save that was loaded

    def end_training(self) -> None:
        """Finish pending saves, then do what ``Accelerator.end_training`` does."""
        self._state.close()
        self._end_training()

    def _automatic(self) -> Path:
        return Path(self._accelerator.project_dir) / "checkpoints"


def _numbered(folder: Path) -> list[Path]:
    """Return the folders of automatic naming, oldest first."""
    return sorted(folder.glob("checkpoint_*"), key=lambda path: int(path.name.removeprefix("checkpoint_")))


def _refuse(options: Mapping[str, Any], hooks: Mapping[Any, Any]) -> None:
    if options:
        raise OptionError(f"{', '.join(options)}: incckpt's save_state and load_state take no such argument")
    if hooks:
        raise OptionError(
            "registered hooks of save_state or load_state write and read files of their own, which a store does not "
            "have: remove them, and register what they save with register_for_checkpointing"
        )
