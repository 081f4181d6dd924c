"""The `Trainer` of Hugging Face transformers, and TRL's, with incremental checkpoints at a URL.

Two lines of a script change::

    from incckpt.integrations.transformers import incremental
    trainer = incremental(Trainer, url="s3://bucket/exp7")(model=model, args=args, train_dataset=dataset)

``checkpoint-N`` folders stay, without tensors: the trainer's state, config, tokenizer, and where the tensors are.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from incckpt.backends.base import Backend, redact
from incckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    DistributedError,
    MissingExtraError,
    OptionError,
)
from incckpt.integrations._files import read_files, write_files
from incckpt.integrations._pointer import Place, Pointer, absolute, find
from incckpt.integrations._ranks import Ranks
from incckpt.integrations._resuming import (
    POINTER_NAME,
    PREFIX,
    STATE_NAME,
    Resumed,
    named,
    place_in,
    plain_folder,
    point_at,
    step_of,
)
from incckpt.integrations._trainer_parts import BEST_STEP, Held, KeepAsTrainer, adapters_of, save_configuration
from incckpt.manager import CheckpointManager
from incckpt.state.rng import RngState
from incckpt.store.location import locate

try:
    from transformers.trainer_utils import get_last_checkpoint
except ImportError as error:
    raise MissingExtraError(
        'incckpt.integrations.transformers needs transformers and accelerate: pip install "incckpt[transformers]"'
    ) from error

__all__ = ["IncrementalTrainerMixin", "incremental"]

log = logging.getLogger(__name__)

_T = TypeVar("_T")

_MOST_METRICS = 100
_RETENTION = ("keep_last_n", "keep_best_n", "retention")


class IncrementalTrainerMixin:
    """Makes a `Trainer` save into a store: ``class MyTrainer(IncrementalTrainerMixin, Trainer)``, the mixin first.

    Saves return as soon as what changed is copied, and are written in the background; `train` returns when they are
    durable, and raises if one failed. ``resume_from_checkpoint`` of `train` may be ``True``, a ``checkpoint-N`` folder,
    thin or not, or a URL such as ``"s3://bucket/exp7"`` or ``"s3://bucket/exp7#run@500"``, where no folder is needed.

    Parameters
    ----------
    checkpoint_url
        Of the store, and the run after ``#``; in place of the class attribute of that name. A `Backend` works too, for
        one call of `train`.
    checkpoint_options
        For `CheckpointManager`. Without ``keep_last_n``, ``keep_best_n`` or ``retention``, the store keeps what
        ``save_total_limit`` keeps, and the best checkpoint.
    whole_model
        Whether to save the base of a PEFT model too, not only its adapters.

    Raises
    ------
    OptionError
        If there is no URL, or `enable_jit_checkpoint` is set. From `train`: if it starts afresh in a run that has
        checkpoints.
    DistributedError
        With FSDP, DeepSpeed, tensor parallelism or XLA.
    """

    checkpoint_url: str | os.PathLike[str] | Backend | None = None
    checkpoint_options: Mapping[str, Any] = {}
    whole_model: bool = False

    # What the `Trainer` beside this class has. Its subclasses may use any other name, so ours have a prefix.
    args: Any
    accelerator: Any
    model: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    _get_output_dir: Any

    def __init__(
        self,
        *args: Any,
        checkpoint_url: str | os.PathLike[str] | Backend | None = None,
        checkpoint_options: Mapping[str, Any] | None = None,
        whole_model: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if checkpoint_url is not None:
            self.checkpoint_url = checkpoint_url
        if checkpoint_options is not None:
            self.checkpoint_options = checkpoint_options
        if whole_model is not None:
            self.whole_model = whole_model
        if self.checkpoint_url is None:
            raise OptionError(
                f"{type(self).__name__} needs the URL of a store: incremental(Trainer, url=…), checkpoint_url=…, or a "
                "class attribute checkpoint_url"
            )
        location = locate(self.checkpoint_url, run=self.checkpoint_options.get("run"))
        if location.step is not None:
            raise OptionError(
                f"checkpoints go to a run; step {location.step!r} is for resume_from_checkpoint, not here"
            )
        own = isinstance(self.checkpoint_url, Backend)
        self._incckpt_store_url = location.store if own else absolute(location.store)
        self._incckpt_base_run = location.run
        self._incckpt_manager: CheckpointManager | None = None
        self._incckpt_manager_run = ""
        self._incckpt_captured: dict[str, Any] | None = None
        self._incckpt_resumed: Resumed | None = None
        self._incckpt_in_train = False
        self._incckpt_said_whole = False
        super().__init__(*args, **kwargs)
        self._incckpt_check_supported()
        self._incckpt_ranks = Ranks(self.args.process_index, self.args.world_size)

    def _incckpt_check_supported(self) -> None:
        """Refuse what this cannot save, before anything is computed."""
        if getattr(self.args, "enable_jit_checkpoint", False):
            raise OptionError(
                "enable_jit_checkpoint replaces the handler of SIGTERM, and saves in the middle of a step, from where "
                "training does not go on exactly; leave it out, and save often: a save costs little"
            )
        model = self.model
        sharded = any(type(one).__name__ == "DTensor" for one in ([] if model is None else model.parameters()))
        for is_used, what in (
            (getattr(self, "is_fsdp_enabled", False), "FSDP"),
            (getattr(self, "is_deepspeed_enabled", False), "DeepSpeed"),
            (sharded or getattr(self, "is_tp_enabled", False), "tensor parallelism"),
            (self.args.device.type == "xla", "XLA"),
        ):
            if is_used:
                instead = (
                    "its engine writes its own checkpoints: use the plain Trainer"
                    if what == "DeepSpeed"
                    else "every rank has to save its part: use the plain Trainer, or a loop of your own with "
                    "incckpt.integrations.dcp"
                )
                raise DistributedError(f"an incremental Trainer does not work with {what} yet, {instead}")

    # -- saving

    def _save_checkpoint(self, model: Any, *args: Any, **kwargs: Any) -> None:
        trial = args[0] if args else kwargs.get("trial")
        if self.args.process_index == 0:
            # First of all: a folder that is cut off without it would look like a plain Trainer's.
            point_at(self._incckpt_folder(trial), self._incckpt_pointer(trial))
        self._incckpt_captured = {}
        try:
            super()._save_checkpoint(model, *args, **kwargs)  # type: ignore[misc]
            captured = self._incckpt_captured
        finally:
            self._incckpt_captured = None
        if self.args.process_index == 0:
            self._incckpt_commit(trial, captured)

    def _incckpt_commit(self, trial: Any, captured: dict[str, Any]) -> None:
        app = {**self._incckpt_weights(), **captured}
        files = read_files(self._incckpt_folder(trial))
        del files[POINTER_NAME]
        app["trainer"] = {"parts": sorted(app), "world_size": self.args.world_size, "files": files}
        manager = self._incckpt_manager_of(self._incckpt_run_of(trial))
        manager.save(self.state.global_step, app, self._incckpt_metrics(), if_exists="replace")
        if not self._incckpt_in_train:
            self._incckpt_close()

    def _incckpt_folder(self, trial: Any) -> Path:
        return Path(self._get_output_dir(trial)) / f"{PREFIX}-{self.state.global_step}"

    def _incckpt_pointer(self, trial: Any) -> Pointer:
        return Pointer(self._incckpt_store_url, self._incckpt_run_of(trial), self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        pushed = self.args.push_to_hub and self.args.hub_strategy != "end"  # from this folder: with its weights
        if self._incckpt_captured is None or pushed:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_configuration(self._incckpt_bare_model(), folder)
            collator = getattr(self, "data_collator", None)
            processing = getattr(self, "processing_class", None) or getattr(collator, "tokenizer", None)
            if processing is not None:
                processing.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._incckpt_captured is None:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        self._incckpt_captured["optimizer"] = _bare_optimizer(self.optimizer)
        self._incckpt_captured["scheduler"] = self.lr_scheduler
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            self._incckpt_captured["scaler"] = scaler

    def _save_scaler(self, output_dir: str) -> None:
        if self._incckpt_captured is None:
            super()._save_scaler(output_dir)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        if self._incckpt_captured is None:
            super()._save_rng_state(output_dir)  # type: ignore[misc]
            return
        os.makedirs(output_dir, exist_ok=True)
        states = self._incckpt_ranks.gather(RngState().state_dict())
        self._incckpt_captured["rng"] = {str(rank): state for rank, state in enumerate(states)}

    def _incckpt_weights(self) -> dict[str, Any]:
        """Return the part of the state that holds the weights: of the adapters alone, or of the model."""
        model = self._incckpt_bare_model()
        adapters = None if self.whole_model else adapters_of(model)
        if adapters is not None and adapters.covers_training():
            return {"adapters": adapters}
        if adapters is not None and not self._incckpt_said_whole:
            self._incckpt_said_whole = True
            log.warning("the whole model is saved, not only its adapters: more of it is trained than they hold")
        return {"model": model}

    def _incckpt_metrics(self) -> dict[str, float]:
        """Return what was logged at this step, and which step was the best so far."""
        metrics: dict[str, float] = {}
        for entry in reversed(self.state.log_history):
            if entry.get("step") != self.state.global_step:
                break
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch") and len(metrics) < _MOST_METRICS:
                    metrics.setdefault(name, value)
        best = step_of(self.state.best_model_checkpoint)
        return metrics if best is None else {**metrics, BEST_STEP: best}

    # -- resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as `Trainer.train` does.

        Parameters
        ----------
        resume_from_checkpoint
            ``True`` for the run's latest checkpoint; a ``checkpoint-N`` folder, thin or a plain Trainer's; or a URL.
        *args, **kwargs
            As for `Trainer.train`.

        Raises
        ------
        OptionError
            If it starts afresh, or from an earlier step of another run, and the run has checkpoints already.
        StoreNotFoundError, CheckpointNotFoundError
            If the URL leads to no checkpoint.
        CorruptionError
            If the checkpoint is damaged. With ``True``, earlier ones are tried first.
        SaveError
            If the last saves failed.
        """
        trial = args[0] if args else kwargs.get("trial")
        self._incckpt_in_train = True
        try:
            sources, plain = self._incckpt_ranks.on_first(
                partial(self._incckpt_sources, resume_from_checkpoint or None, trial)
            )
            result = None
            if not sources:
                result = super().train(plain, *args, **kwargs)  # type: ignore[misc]
            for number, source in enumerate(sources, 1):
                try:
                    self._incckpt_resumed = self._incckpt_prepare(source, trial)
                    result = super().train(self._incckpt_resumed.folder, *args, **kwargs)  # type: ignore[misc]
                    break
                except CorruptionError as damage:
                    if number == len(sources) or (self._incckpt_resumed is not None and self._incckpt_resumed.restored):
                        raise
                    log.error("%s cannot be read, falling back to the one before it: %s", source, damage)
        except BaseException:
            if self._incckpt_manager is not None:
                self._incckpt_manager.__exit__(*sys.exc_info())
                self._incckpt_manager = None
            raise
        finally:
            self._incckpt_in_train, self._incckpt_resumed = False, None
        self._incckpt_close()
        return result

    def _incckpt_sources(self, resume: Any, trial: Any) -> tuple[list[Pointer], Any]:
        """Return the checkpoints of stores to resume from, in the order to try; or else what the `Trainer` is given."""
        run = self._incckpt_run_of(trial)
        place = f"run {run!r} at {redact(self._incckpt_store_url)}"
        if resume is None and str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) == "no":
            return [], None
        there = self._incckpt_manager_of(run).checkpoints()
        own = [Pointer(self._incckpt_store_url, run, found.step, found.ref) for found in reversed(there)]
        plain: Any = None
        sources: list[Pointer] = []
        if resume is True:
            output = self._get_output_dir(trial)
            folder = plain_folder(get_last_checkpoint(output)) if os.path.isdir(output) else None
            if own and (step_of(folder) or -1) <= own[0].step:
                sources = own
            elif folder is None:
                raise CheckpointNotFoundError(
                    f"resume_from_checkpoint=True: {place} has no checkpoint, and {output} has none either"
                )
            else:
                plain = folder
        elif resume is not None:
            found = named(resume, self._incckpt_store_url, self._incckpt_reader)
            sources, plain = ([found], None) if isinstance(found, Pointer) else ([], found)
        going_on = bool(sources) and (sources[0].store, sources[0].run) == (self._incckpt_store_url, run)
        start = sources[0].step if sources else step_of(plain)
        if own and not going_on and (start or 0) <= own[0].step:
            raise OptionError(
                f"{place} has checkpoints up to step {own[0].step} already, and training would start at "
                f"step {start or 0}: resume with train(resume_from_checkpoint=True), or save to another run, …#another"
            )
        return sources, plain

    def _incckpt_prepare(self, source: Pointer, trial: Any) -> Resumed:
        """Write the thin folder of a checkpoint, as the `Trainer` reads its own state from there."""
        output = Path(self._get_output_dir(trial))
        folder = output / f"{PREFIX}-{source.step}"
        with self._incckpt_reader(source.store, source.run) as reader:
            trainer = reader.load(source.ref, keys=["trainer"])["trainer"]
            files = dict(trainer["files"])
            state = json.loads(files[STATE_NAME])
            best = step_of(state.get("best_model_checkpoint"))
            has_best = best is not None and any(found.step == best for found in reader.checkpoints())
        if self.args.local_process_index == 0:
            if has_best:
                best_folder = output / f"{PREFIX}-{best}"
                state["best_model_checkpoint"] = str(best_folder)
                files[STATE_NAME] = (json.dumps(state, indent=2, sort_keys=True) + "\n").encode()
                point_at(best_folder, Pointer(source.store, source.run, best or 0))
            point_at(folder, source)
            write_files(folder, files)
        self._incckpt_ranks.wait()
        return Resumed(source, str(folder), frozenset(trainer["parts"]), trainer["world_size"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._incckpt_resumed is not None and resume_from_checkpoint == self._incckpt_resumed.folder:
            return  # restored with the optimizer, in one pass
        place = place_in(resume_from_checkpoint, self._incckpt_store_url)
        if place is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        else:
            self._incckpt_restore_weights(place, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        resumed = self._incckpt_resumed
        if resumed is None or checkpoint != resumed.folder:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        rng = Held()
        targets = {
            **self._incckpt_targets(resumed.parts),
            "optimizer": _bare_optimizer(self.optimizer),
            "scheduler": self.lr_scheduler,
            "scaler": getattr(self.accelerator, "scaler", None),
            "rng": rng,
        }
        app = {name: target for name, target in targets.items() if name in resumed.parts and target is not None}
        ignored = ["trainer", *sorted(resumed.parts.difference(app))]
        if "optimizer" not in app:
            log.warning("%s has no optimizer and no generators: it was saved with save_only_model", resumed.source)

        def restore() -> None:
            own = (resumed.source.store, resumed.source.run) == (self._incckpt_store_url, self._incckpt_manager_run)
            if own and self.args.process_index == 0:
                self._incckpt_manager_of(resumed.source.run).restore(app, resumed.source.ref, ignore=ignored)
                return
            with self._incckpt_reader(resumed.source.store, resumed.source.run) as reader:
                reader.restore(app, resumed.source.ref, ignore=ignored)

        self._incckpt_ranks.on_every(restore)
        resumed.rng, resumed.restored = rng.state or {}, True

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._incckpt_resumed is None or checkpoint != self._incckpt_resumed.folder:
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        resumed = self._incckpt_resumed
        if resumed is None or checkpoint != resumed.folder:
            super()._load_rng_state(checkpoint)  # type: ignore[misc]
            return
        if resumed.world_size != self.args.world_size:
            log.warning(
                "the random number generators are not restored: %d processes saved %s, there are %d",
                resumed.world_size, resumed.source, self.args.world_size,
            )  # fmt: skip
        elif resumed.rng:
            RngState().load_state_dict(resumed.rng[str(self.args.process_index)])

    def _load_best_model(self) -> None:
        self._incckpt_close()  # what is being written may be the best
        self._incckpt_ranks.wait()
        place = place_in(self.state.best_model_checkpoint, self._incckpt_store_url)
        if place is None:
            super()._load_best_model()  # type: ignore[misc]
            return
        log.info("loading the best model of step %s (score: %s)", place.which, self.state.best_metric)
        self._incckpt_restore_weights(replace(place, announced=False), None)  # no other one will do

    def _incckpt_restore_weights(self, place: Place, model: Any) -> None:
        with self._incckpt_reader(place.store, place.run) as reader:
            ref = find(reader, place).ref
            parts = reader.load(ref, keys=["trainer.parts"])["trainer"]["parts"]
            app = self._incckpt_targets(frozenset(parts), model)
            reader.restore(app, ref, keys=list(app))

    def _incckpt_targets(self, parts: frozenset[str], model: Any = None) -> dict[str, Any]:
        """Return what the weights of a checkpoint with these `parts` are restored into."""
        bare = self._incckpt_bare_model(model)
        if "model" in parts:
            return {"model": bare}
        adapters = adapters_of(bare)
        if adapters is None:
            raise OptionError(f"the checkpoint has the weights of adapters, and the model is a {type(bare).__name__}")
        return {"adapters": adapters}

    # -- managers

    def _incckpt_manager_of(self, run: str) -> CheckpointManager:
        """Return the manager of a run, which the first process alone has."""
        if self._incckpt_manager is None or self._incckpt_manager_run != run:
            self._incckpt_close()
            self._incckpt_manager, self._incckpt_manager_run = self._incckpt_open(self._incckpt_store_url, run), run
        return self._incckpt_manager

    def _incckpt_open(self, store: str, run: str, *, read_only: bool = False) -> CheckpointManager:
        options = {name: value for name, value in self.checkpoint_options.items() if name != "run"}
        if read_only:
            options = {name: value for name, value in options.items() if name not in _RETENTION}
        elif (self.args.save_total_limit or 0) > 0 and not any(name in options for name in _RETENTION):
            options["retention"] = KeepAsTrainer(self.args.save_total_limit)
        url: Any = self.checkpoint_url if isinstance(self.checkpoint_url, Backend) and not read_only else store
        return CheckpointManager(url, run=run, read_only=read_only, **options)

    def _incckpt_reader(self, store: str, run: str) -> CheckpointManager:
        return self._incckpt_open(store, run, read_only=True)

    def _incckpt_close(self) -> None:
        """Finish the saves under way; raise if one failed."""
        manager, self._incckpt_manager = self._incckpt_manager, None
        if manager is not None:
            manager.close()

    def _incckpt_run_of(self, trial: Any) -> str:
        """Return the run to save to: of a hyperparameter search, each trial has its own."""
        if trial is None or getattr(self, "hp_search_backend", None) is None:
            return self._incckpt_base_run
        return f"{self._incckpt_base_run}.{Path(self._get_output_dir(trial)).name}"

    def _incckpt_bare_model(self, model: Any = None) -> Any:
        model = self.model if model is None else model
        return getattr(model, "_orig_mod", model)  # of a compiled one


def incremental(
    trainer: type[_T], url: str | os.PathLike[str] | Backend, *, whole_model: bool = False, **options: Any
) -> type[_T]:
    """Return a subclass of a `Trainer` class that saves incremental checkpoints to `url`.

    Parameters
    ----------
    trainer
        `Trainer`, a subclass, or one of TRL's.
    url, whole_model
        As for `IncrementalTrainerMixin`.
    **options
        For `CheckpointManager`.

    Examples
    --------
    >>> trainer = incremental(SFTTrainer, url="s3://bucket/exp7")(model, args, train_dataset)  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint="s3://bucket/exp7")  # doctest: +SKIP
    """
    body = {
        "checkpoint_url": url,
        "checkpoint_options": options,
        "whole_model": whole_model,
        "__module__": trainer.__module__,
        "__doc__": trainer.__doc__,
    }
    return type(f"Incremental{trainer.__name__}", (IncrementalTrainerMixin, trainer), body)


def _bare_optimizer(optimizer: Any) -> Any:
    """Return the optimizer that accelerate has wrapped."""
    return optimizer.optimizer if type(optimizer).__name__ == "AcceleratedOptimizer" else optimizer
