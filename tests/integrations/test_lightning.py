"""Lightning with `IncrementalCheckpointIO`: what `ModelCheckpoint` promises, with checkpoints in a store."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

lightning = pytest.importorskip("lightning", exc_type=ImportError)

from lightning.fabric import Fabric
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import incckpt
from incckpt.errors import CheckpointNotFoundError, OptionError, SaveError
from incckpt.integrations.lightning import (
    IncrementalCheckpointIO,
    RandomState,
    load_checkpoint,
    load_from_checkpoint,
)

pytestmark = pytest.mark.slow

EXAMPLES = torch.utils.data.TensorDataset(torch.randn(32, 4, generator=torch.Generator().manual_seed(0)))
STEPS = 8  # per epoch


class Net(LightningModule):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Dropout(0.1), torch.nn.Linear(width, 1))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss: torch.Tensor = self.net(batch[0]).square().mean()
        return loss

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        self.log("val", self.net(batch[0]).square().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch)]

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(EXAMPLES, 4, shuffle=True)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(EXAMPLES, 8)

    test_dataloader = val_dataloader


class StopAt(Callback):
    """Ends a training as a crash would: without a chance to save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyError(f"stopped at {self.step}")


def make_trainer(plugins: list[Any], *, epochs: int, callbacks: list[Any] | None = None, **options: Any) -> Any:
    options = {"dirpath": "files", "monitor": "val", "save_top_k": 2, "save_last": True} | options
    return Trainer(
        accelerator="cpu",
        callbacks=[*(callbacks or []), ModelCheckpoint(**options), RandomState()],
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=epochs,
        plugins=plugins,
    )


def train(plugins: list[Any], *, epochs: int, ckpt_path: str | None = None, **options: Any) -> Net:
    seed_everything(1)
    net = Net()
    make_trainer(plugins, epochs=epochs, **options).fit(net, ckpt_path=ckpt_path)
    return net


def same(one: Net, other: Net) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def steps(store: str = "store") -> list[int]:
    return [checkpoint.step for checkpoint in incckpt.list_checkpoints(store)]


def files() -> dict[str, Any]:
    """What the files of a training name, by name: global steps."""
    return {path.name: load_checkpoint(path)["global_step"] for path in Path("files").iterdir()}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Net:
    """Five epochs of Lightning's own."""
    folder = tmp_path_factory.mktemp("plain")
    seed_everything(1)
    net = Net()
    make_trainer([], epochs=5, dirpath=folder).fit(net)
    return net


@pytest.mark.parametrize("save_last", [True, "link"])
def test_an_interrupted_training_goes_on_bit_for_bit_from_its_last_file(save_last: Any, plain: Net) -> None:
    with pytest.raises(KeyError):
        train([IncrementalCheckpointIO("store")], epochs=5, callbacks=[StopAt(3 * STEPS + 2)], save_last=save_last)
    assert Path("files/last.ckpt").is_symlink() == (save_last == "link")
    resumed = train([IncrementalCheckpointIO("store")], epochs=5, ckpt_path="last", save_last=save_last)
    assert same(resumed, plain)
    assert files()["last.ckpt"] == 5 * STEPS


def test_a_training_goes_on_by_url_where_there_are_no_files(plain: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{Path.cwd() / 'store'}#exp-7"
    with pytest.raises(KeyError):
        train([IncrementalCheckpointIO(url)], epochs=5, callbacks=[StopAt(3 * STEPS + 2)])
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    checkpoints = IncrementalCheckpointIO(url)
    assert checkpoints.latest == f"{url}@{3 * STEPS}"
    assert same(train([checkpoints], epochs=5, ckpt_path=checkpoints.latest), plain)


def test_a_first_start_has_no_latest() -> None:
    assert IncrementalCheckpointIO("store").latest is None


@pytest.mark.parametrize("top", [1, 2, 3, -1])
def test_the_store_keeps_what_files_name_and_nothing_else(top: int) -> None:
    train([IncrementalCheckpointIO("store")], epochs=5, save_top_k=top)
    assert len(files()) == (5 if top == -1 else top) + 1
    assert set(files().values()) == set(steps())


def test_only_the_last_is_kept_without_a_top() -> None:
    train([IncrementalCheckpointIO("store")], epochs=3, save_top_k=0, monitor=None)
    assert files() == {"last.ckpt": 3 * STEPS}
    assert steps() == [3 * STEPS]


def test_checkpoints_of_an_earlier_session_go_when_their_files_do() -> None:
    train([IncrementalCheckpointIO("store")], epochs=2)
    train([IncrementalCheckpointIO("store")], epochs=5, ckpt_path="last")
    assert set(files().values()) == set(steps())


def test_best_is_the_best() -> None:
    trainer = make_trainer([IncrementalCheckpointIO("store")], epochs=4)
    trainer.fit(Net())
    best = trainer.checkpoint_callback.best_model_path
    scores = {str(path): float(score) for path, score in trainer.checkpoint_callback.best_k_models.items()}
    found = {checkpoint.step: checkpoint.metrics["val"] for checkpoint in incckpt.list_checkpoints("store")}
    assert sorted(found.values()) == sorted(scores.values())
    assert trainer.test(ckpt_path="best", verbose=False)[0]["val"] == pytest.approx(scores[best])
    assert incckpt.load("store#@best")["global_step"] == load_checkpoint(best)["global_step"]


def test_best_is_found_by_a_resumed_training_without_its_file() -> None:
    trainer = make_trainer([IncrementalCheckpointIO("store")], epochs=2)
    trainer.fit(Net())
    best = Path(trainer.checkpoint_callback.best_model_path)
    score = float(trainer.checkpoint_callback.best_model_score)
    for path in Path("files").iterdir():
        path.unlink()
    again = make_trainer([IncrementalCheckpointIO("store")], epochs=2)
    again.fit(Net(), ckpt_path="store")
    assert not best.exists()
    assert again.test(ckpt_path="best", verbose=False)[0]["val"] == pytest.approx(score)


def test_a_test_between_two_fits_takes_nothing_back() -> None:
    plugin = IncrementalCheckpointIO("store")
    trainer = make_trainer([plugin], epochs=3, save_top_k=-1)
    trainer.fit(net := Net())
    trainer.test(net, ckpt_path="files/epoch=0-step=8.ckpt", verbose=False)
    trainer.fit_loop.max_epochs = 5
    trainer.fit(net)
    assert steps() == [STEPS * epoch for epoch in range(1, 6)]


def test_loading_disturbs_no_writer() -> None:
    with incckpt.CheckpointManager("store") as writer:
        writer.save(1, {"global_step": 1}).result()
        make_trainer([plugin := IncrementalCheckpointIO("store")], epochs=1)
        assert plugin.load_checkpoint("store")["global_step"] == 1
        assert load_checkpoint("store#default@1")["global_step"] == 1
        writer.save(2, {"global_step": 2}).result()


def test_a_training_goes_on_from_an_earlier_checkpoint_and_abandons_the_later_ones() -> None:
    train([IncrementalCheckpointIO("store")], epochs=4, save_top_k=-1)
    from_two = train(
        [IncrementalCheckpointIO("store")], epochs=6, ckpt_path=f"store#default@{2 * STEPS}", save_top_k=-1
    )
    attempts = {checkpoint.step: checkpoint.attempt for checkpoint in incckpt.list_checkpoints("store")}
    assert attempts == {8: 1, 16: 1, 24: 2, 32: 2, 40: 2, 48: 2}
    latest = load_from_checkpoint(Net, "store")
    assert same(latest, from_two)
    with pytest.raises(CheckpointNotFoundError):  # the file names what was abandoned, not what has taken its place
        load_checkpoint("files/epoch=3-step=32.ckpt")
    assert load_checkpoint("files/epoch=3-step=32-v1.ckpt")["global_step"] == 4 * STEPS


def test_a_training_that_was_not_resumed_is_told_how_to_go_on() -> None:
    train([IncrementalCheckpointIO("store")], epochs=2)
    with pytest.raises(OptionError, match=r"ckpt_path=.*#default@16 .*#second-try"):
        train([IncrementalCheckpointIO("store")], epochs=1)
    assert steps()[-1] == 2 * STEPS
    train([IncrementalCheckpointIO("store#second-try")], epochs=1)


def test_a_save_of_weights_alone_replaces_no_full_one() -> None:
    trainer = make_trainer([IncrementalCheckpointIO("store")], epochs=1)
    trainer.fit(Net())
    trainer.save_checkpoint("files/weights.ckpt", weights_only=True)
    trainer.strategy.checkpoint_io.teardown()
    assert "optimizer_states" in load_checkpoint("files/last.ckpt")
    assert load_checkpoint("files/weights.ckpt")["global_step"] == STEPS


def test_checkpoints_of_lightnings_own_are_gone_on_from(plain: Net) -> None:
    with pytest.raises(KeyError):
        train([], epochs=5, callbacks=[StopAt(2 * STEPS + 1)])
    assert same(train([IncrementalCheckpointIO("store")], epochs=5, ckpt_path="last"), plain)


@pytest.mark.parametrize("form", [str, Path])
def test_a_module_is_made_from_a_checkpoint(form: Any) -> None:
    trained = train([IncrementalCheckpointIO("store")], epochs=1, save_top_k=1)
    made = load_from_checkpoint(Net, form("files/last.ckpt"))
    assert made.hparams.width == 8
    assert same(made, trained)
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_from_checkpoint(Net, form("files/last.ckpt"), width=9)


def test_what_cannot_be_saved_is_named() -> None:
    class Other(Net):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["activation"] = torch.nn.ReLU

    with pytest.raises(incckpt.errors.StateError, match="activation"):
        make_trainer([IncrementalCheckpointIO("store")], epochs=1).fit(Other())
    plugin = IncrementalCheckpointIO("store", allow_pickle=True)
    make_trainer([plugin], epochs=1).fit(Other())
    assert plugin.load_checkpoint("files/last.ckpt")["activation"] is torch.nn.ReLU


def test_a_wrapping_async_plugin_is_refused() -> None:
    with pytest.raises(OptionError, match="AsyncCheckpointIO"):
        make_trainer([AsyncCheckpointIO(IncrementalCheckpointIO("store"))], epochs=2).fit(Net())
    assert not Path("store").exists()


@pytest.mark.parametrize("option", ["keep_last_n", "keep_best_n", "retention", "read_only", "run"])
def test_options_that_lightning_decides_are_refused(option: str) -> None:
    with pytest.raises(OptionError, match=option):
        IncrementalCheckpointIO("store", **{option: 1})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="ckpt_path"):
        IncrementalCheckpointIO("store#run@5")


def test_a_save_that_fails_is_raised_and_takes_nothing_away() -> None:
    plugin = IncrementalCheckpointIO("store")
    plugin.save_checkpoint({"global_step": 1}, "1.ckpt")
    plugin.wait()
    shutil.copytree("store", "copy")
    shutil.rmtree("store")
    plugin.save_checkpoint({"global_step": 2}, "2.ckpt")
    plugin.remove_checkpoint("1.ckpt")
    with pytest.raises(incckpt.IncckptError):
        plugin.teardown()
    shutil.rmtree("store", ignore_errors=True)
    os.rename("copy", "store")
    assert load_checkpoint("2.ckpt")["global_step"] == 1


def test_a_file_that_cannot_be_written_fails_the_next_save() -> None:
    plugin = IncrementalCheckpointIO("store")
    Path("last.ckpt").mkdir()
    plugin.save_checkpoint({"global_step": 1}, "last.ckpt")
    with pytest.raises(SaveError, match=r"last\.ckpt"):
        plugin.wait()
    assert steps() == [1]


def test_a_file_announces_a_save_until_it_is_committed(caplog: pytest.LogCaptureFixture) -> None:
    from incckpt.integrations._pointer import Pointer, store_name, write_pointer

    plugin = IncrementalCheckpointIO("store")
    for step in (1, 2):
        plugin.save_checkpoint({"global_step": step}, f"{step}.ckpt")
    plugin.teardown()
    write_pointer("3.ckpt", Pointer(store_name("store"), "default", 3))  # as its writer left it when it was killed
    assert load_checkpoint("3.ckpt")["global_step"] == 2
    assert "step 3 was announced but never committed" in caplog.text
    assert plugin.load_checkpoint("3.ckpt")["global_step"] == 2
    plugin.save_checkpoint({"global_step": 3}, "3.ckpt")
    plugin.wait()
    assert load_checkpoint("3.ckpt")["global_step"] == 3


def test_a_damaged_file_is_named() -> None:
    Path("a.ckpt").write_text('{"incckpt": 1, "store": "x"')
    with pytest.raises(incckpt.errors.FormatError, match=r"a\.ckpt"):
        load_checkpoint("a.ckpt")
    Path("b.ckpt").write_text('{"incckpt": 2, "store": "x"}')
    with pytest.raises(incckpt.errors.FormatError, match="later version"):
        load_checkpoint("b.ckpt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint("c.ckpt")


def test_a_plugin_can_be_sent_to_processes() -> None:
    plugin = pickle.loads(pickle.dumps(IncrementalCheckpointIO("store#exp", threads=1)))
    plugin.save_checkpoint({"global_step": 1}, "1.ckpt")
    plugin.teardown()
    assert incckpt.load("store#exp")["global_step"] == 1


def test_files_may_be_remote() -> None:
    plugin = IncrementalCheckpointIO("store")
    for step in (1, 2):
        plugin.save_checkpoint({"global_step": step}, f"memory://files/{step}.ckpt")
    plugin.remove_checkpoint("memory://files/1.ckpt")
    plugin.teardown()
    assert steps() == [2]
    assert load_checkpoint("memory://files/2.ckpt")["global_step"] == 2


def test_fabric_saves_and_resumes() -> None:
    def make() -> Any:
        model = torch.nn.Linear(4, 1)
        return fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))

    fabric = Fabric(accelerator="cpu", devices=1, plugins=[IncrementalCheckpointIO("store")])
    fabric.launch()
    fabric.seed_everything(0)
    model, optimizer = make()
    weights = []
    for _ in range(4):
        fabric.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
        fabric.save("files/fabric.ckpt", {"model": model, "optimizer": optimizer, "iteration": len(weights)})
    model, optimizer = make()
    state = {"model": model, "optimizer": optimizer, "iteration": 0}
    fabric.load("files/fabric.ckpt", state)
    assert state["iteration"] == 4
    assert torch.equal(model.weight, weights[-1])
    assert steps() == [3]  # the state has no global_step, so saves are numbered; the file names the last alone
    fabric.load("store#default@3", state)
