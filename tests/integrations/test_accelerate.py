"""Accelerate with `IncrementalState` and `install`: trainings go on bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", exc_type=ImportError)

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed

import incckpt
from incckpt.errors import DistributedError, OptionError, StateMismatchError, StoreNotFoundError
from incckpt.integrations.accelerate import IncrementalState, install

pytestmark = pytest.mark.slow

EXAMPLES = torch.utils.data.TensorDataset(torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))
PER_EPOCH = 10


class Ema:
    """An object that a script registers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.average = [one.detach().clone() for one in model.parameters()]
        self.updates = 0

    def update(self) -> None:
        self.updates += 1
        for average, one in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(one.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.updates = [one.clone() for one in state["average"]], state["updates"]


class Training:
    """A script's objects, made anew as a new process would."""

    def __init__(
        self, *, accumulate: int = 1, stateful: bool = True, compiled: bool = False, workers: int = 0, **options: Any
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=True,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, use_stateful_dataloader=stateful),
            gradient_accumulation_steps=accumulate,
            **options,
        )
        set_seed(0)
        model: Any = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
        loader = torch.utils.data.DataLoader(
            EXAMPLES, 4, shuffle=True, generator=torch.Generator().manual_seed(3), num_workers=workers
        )
        if compiled:
            model = torch.compile(model, backend="eager")
        self.model, self.optimizer, self.loader, self.schedule = self.accelerator.prepare(
            model, optimizer, loader, schedule
        )
        self.ema = Ema(model)
        self.accelerator.register_for_checkpointing(self.ema)
        self.step = 0

    def batches(self, until: int) -> Any:
        while self.step < until:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.accelerator.backward(self.model(batch[0]).square().mean())
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.ema.update()
                self.step += 1
                yield self.step
                if self.step == until:
                    return

    def train(self, until: int) -> Training:
        for _ in self.batches(until):
            pass
        return self

    def result(self) -> list[torch.Tensor]:
        rate = torch.tensor(self.schedule.get_last_lr())
        return [*self.model.state_dict().values(), *self.ema.average, rate, torch.get_rng_state()]


def same(one: Training, other: list[torch.Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(one.result(), other, strict=True))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("stop", [4, PER_EPOCH, PER_EPOCH + 3])  # within an epoch, at its end; within accumulation
def test_a_training_goes_on_bit_for_bit(stop: int, accumulate: int) -> None:
    whole = Training(accumulate=accumulate).train(25).result()
    training = Training(accumulate=accumulate).train(stop)
    with IncrementalState(training.accelerator, "store") as state:
        state.save(stop, {"loss": 1.0})
    again = Training(accumulate=accumulate)
    with IncrementalState(again.accelerator, "store") as state:
        again.step = state.load() or 0
        assert again.step == stop
        again.train(25)
        state.save(25)
    assert same(again, whole)


def test_an_epoch_goes_on_by_skipping_where_the_loader_is_not_stateful() -> None:
    whole = Training(stateful=False).train(25).result()
    with IncrementalState(Training(stateful=False).train(14).accelerator, "store") as state:
        state.save(14)
    again = Training(stateful=False)
    with IncrementalState(again.accelerator, "store") as state:
        again.step = state.load() or 0
    rest, again.loader = again.loader, again.accelerator.skip_first_batches(again.loader, 14 % PER_EPOCH)
    again.train(20)
    again.loader = rest
    again.loader.set_epoch(2)
    assert same(again.train(25), whole)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True)])
def test_what_torch_compile_wraps_goes_by_its_own_names(before: bool, after: bool) -> None:
    whole = Training().train(25).result()
    with IncrementalState(Training(compiled=before).train(4).accelerator, "store") as state:
        state.save(4)
    again = Training(compiled=after)
    with IncrementalState(again.accelerator, "store") as state:
        again.step = state.load() or 0
    assert same(again.train(25), whole)


def test_the_scalers_state_is_saved() -> None:
    training = Training()
    training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with IncrementalState(training.accelerator, "store") as state:
        state.save(1)
    again = Training()
    again.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with IncrementalState(again.accelerator, "store") as state:
        state.load()
    assert again.accelerator.scaler.get_scale() == 8.0


def test_a_run_without_checkpoints_begins_anew() -> None:
    training = Training()
    with IncrementalState(training.accelerator, "store") as state:
        assert state.load() is None
        with pytest.raises(StoreNotFoundError):
            state.load(3)


def test_a_loader_that_is_not_stateful_any_more_is_refused() -> None:
    with IncrementalState(Training().train(4).accelerator, "store") as state:
        state.save(4)
    with (
        IncrementalState(Training(stateful=False).accelerator, "store") as state,
        pytest.raises(StateMismatchError, match="use_stateful_dataloader"),
    ):
        state.load()


def test_other_models_are_refused() -> None:
    with IncrementalState(Training().accelerator, "store") as state:
        state.save(1)
    again = Training()
    again.accelerator.prepare(torch.nn.Linear(2, 2))
    with IncrementalState(again.accelerator, "store") as state, pytest.raises(StateMismatchError, match="models"):
        state.load()


def test_what_makes_resuming_inexact_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    training.accelerator.prepare(torch.utils.data.DataLoader(EXAMPLES, 4))
    with IncrementalState(training.accelerator, "store") as state:
        state.save(1)
        state.save(2)
    training = Training(workers=1)
    with IncrementalState(training.accelerator, "store#workers") as state:
        state.save(1)
    assert "resumes a stateful data loader with workers at other batches" in caplog.text
    assert [record.getMessage() for record in caplog.records if "global" in record.getMessage()] == [
        "resuming within an epoch will not be exact: a data loader draws from the global generator when it starts; "
        "DataLoader(…, generator=torch.Generator())"
    ]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_parts_of_a_model_are_refused(kind: str) -> None:
    training = Training()
    training.accelerator.state.distributed_type = getattr(type(training.accelerator.distributed_type), kind)
    with pytest.raises(DistributedError, match=rf"{kind}.*incckpt\.integrations\.dcp"):
        IncrementalState(training.accelerator, "store")


# -- scripts that call save_state and load_state


def steps() -> list[int]:
    return [checkpoint.step for checkpoint in incckpt.list_checkpoints("store")]


def automatic(limit: int | None = None) -> Any:
    return ProjectConfiguration(project_dir="project", automatic_checkpoint_naming=True, total_limit=limit)


def test_a_script_with_folders_of_its_own_goes_on() -> None:
    whole = Training().train(25).result()
    training = Training()
    install(training.accelerator, "store")
    for step in training.batches(14):
        if step % 4 == 0:
            assert training.accelerator.save_state(f"step_{step}") == Path(f"step_{step}")
    training.accelerator.end_training()
    assert sorted(path.name for path in Path("step_12").iterdir()) == ["checkpoint.json"]
    assert steps() == [0, 1, 2]
    for where in ("step_12", "store", f"{Path.cwd()}/store#default@2"):
        again = Training()
        state = install(again.accelerator, "store")
        again.accelerator.load_state(where)
        again.step = 12
        assert again.accelerator.save_iteration == 3
        assert same(again.train(25), whole)
        state.close()
    again = Training()
    install(again.accelerator, "store")
    again.accelerator.load_state("step_4")
    again.accelerator.save_state("again_8")
    again.accelerator.end_training()
    assert steps() == [0, 1]


@pytest.mark.parametrize("limit", [None, 2])
def test_automatic_naming_and_its_limit(limit: int | None) -> None:
    training = Training(project_config=automatic(limit))
    install(training.accelerator, "store")
    for step in training.batches(9):
        if step % 2 == 0:
            training.accelerator.save_state()
    training.accelerator.end_training()
    kept = [0, 1, 2, 3] if limit is None else [2, 3]
    assert steps() == kept
    assert sorted(path.name for path in Path("project/checkpoints").iterdir()) == [f"checkpoint_{n}" for n in kept]
    shutil.rmtree("project")
    again = Training(project_config=automatic(limit))
    install(again.accelerator, "store")
    again.accelerator.load_state()  # by the run: there is no folder
    again.step = 8
    again.train(9)
    again.accelerator.save_state()
    again.accelerator.end_training()
    assert steps()[-1] == 4
    assert same(again, training.result())


def test_calls_that_cannot_be_served_say_so() -> None:
    training = Training(project_config=automatic(2))
    with pytest.raises(OptionError, match="total_limit"):
        install(training.accelerator, "store", keep_last_n=1)
    training = Training()
    with pytest.raises(OptionError, match="give the step to load"):
        install(training.accelerator, "store#run@4")
    install(training.accelerator, "store")
    with pytest.raises(OptionError, match="needs a folder"):
        training.accelerator.save_state()
    with pytest.raises(OptionError, match="folder or a URL"):
        training.accelerator.load_state()
    with pytest.raises(OptionError, match="strict"):
        training.accelerator.load_state("store", strict=False)
    Path("empty").mkdir()
    with pytest.raises(StoreNotFoundError, match="empty names no checkpoint"):
        training.accelerator.load_state("empty")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        training.accelerator.load_state("store")
    with pytest.raises(OptionError, match="another store"):
        training.accelerator.load_state("elsewhere")
    training.accelerator.register_save_state_pre_hook(lambda *_: None)
    with pytest.raises(OptionError, match="hooks"):
        training.accelerator.save_state("folder")
