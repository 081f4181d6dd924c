"""Two processes of a DDP job, resumed: each has its own random numbers, and goes on with them."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback

import incckpt
from incckpt.integrations.transformers import incremental
from tests.integrations.tiny import Tokens, arguments, gpt2, weights

pytestmark = pytest.mark.slow

CONTEXT = multiprocessing.get_context("forkserver")
RANKS = 2


class OwnNumbers(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Gives each rank random numbers of its own at the beginning, and ends training at a step."""

    def __init__(self, rank: int, stop: int) -> None:
        self._rank, self._stop = rank, stop

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            torch.manual_seed(100 + self._rank)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._stop:
            control.should_training_stop = True


def trainer_rank(rank: int, port: int, folder: Path, url: str | None, stop: int, resume: bool | str) -> None:
    """Be one of the processes: train a `Trainer`, plain without a URL, and write the weights."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    trainer = (Trainer if url is None else incremental(Trainer, url=url))(
        model=gpt2(), args=arguments(folder), train_dataset=Tokens(64), callbacks=[OwnNumbers(rank, stop)]
    )
    trainer.train(resume_from_checkpoint=resume or None)
    torch.save(weights(trainer.model), folder / f"rank{rank}.pt")
    torch.distributed.barrier()  # a process that leaves early has been seen to leave the other one hanging in gloo
    torch.distributed.destroy_process_group()


def run(rank: Callable[..., None], folder: Path, *given: Any) -> list[dict[str, torch.Tensor]]:
    """Run a job, and return the weights of its ranks."""
    folder.mkdir()
    CONTEXT.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=rank, args=(number, port, folder, *given)) for number in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
        assert process.exitcode == 0
    return [torch.load(folder / f"rank{number}.pt") for number in range(RANKS)]


@pytest.mark.parametrize("by", ["url", "true"])
def test_every_rank_of_a_trainer_goes_on_with_its_numbers(tmp_path: Path, by: str) -> None:
    plain = run(trainer_rank, tmp_path / "plain", None, 0, False)
    url = str(tmp_path / "store")
    run(trainer_rank, tmp_path / "first", url, 5, False)
    with incckpt.CheckpointManager(url, read_only=True) as manager:
        assert [checkpoint.step for checkpoint in manager.checkpoints()] == [2, 4]
        saved = manager.load(4)["rng"]
    assert sorted(saved) == ["0", "1"]
    assert not torch.equal(saved["0"]["torch"], saved["1"]["torch"])
    again = run(trainer_rank, tmp_path / "again", url, 0, url if by == "url" else True)
    for name, tensor in plain[0].items():
        assert torch.equal(again[0][name], tensor), f"{name} is not that of the uninterrupted job"
        assert torch.equal(again[1][name], tensor), f"{name} of rank 1 is not that of the uninterrupted job"
