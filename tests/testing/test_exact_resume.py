"""`assert_exact_resume`: it finds what is not restored, and passes what is; the recipes of its page are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import incckpt
from incckpt.errors import OptionError
from incckpt.testing import assert_exact_resume
from tests.testing import exact_trainings

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("forked_trainings")
def test_every_recipe_is_exact() -> None:
    # After step 7: in the middle of an epoch, and of three batches whose gradients are accumulated.
    assert_exact_resume(exact_trainings.every_recipe, steps=9, kill_at=[7])


@pytest.mark.usefixtures("forked_trainings")
def test_what_may_differ_is_left_out() -> None:
    with pytest.raises(AssertionError, match=r"before any resume.*number") as caught:
        assert_exact_resume(exact_trainings.with_a_clock, steps=2, kill_at=[1], ignore=["clock.*"])
    assert "clock" not in str(caught.value)


def test_a_training_in_a_fresh_interpreter_that_raises_is_shown() -> None:
    with pytest.raises(AssertionError, match="no such thing"):
        assert_exact_resume(exact_trainings.that_raises, steps=2)


@pytest.mark.usefixtures("forked_trainings")
def test_a_training_that_ends_early_is_shown() -> None:
    with pytest.raises(AssertionError, match="ended after step 3, of 4"):
        assert_exact_resume(exact_trainings.that_ends_early, steps=4)


@pytest.mark.usefixtures("forked_trainings")
def test_a_forgotten_generator_is_found() -> None:
    with pytest.raises(AssertionError, match=r"from step 5 on \(after the resume at step 4\), in .*model"):
        assert_exact_resume(exact_trainings.without_random_state, steps=6, kill_at=[4])


@pytest.mark.parametrize("kill_at", [[], [0], [3]])
def test_steps_that_are_none_are_refused(kill_at: list[int]) -> None:
    with pytest.raises(OptionError, match="from 1 to 2"):
        assert_exact_resume(exact_trainings.that_raises, steps=3, kill_at=kill_at)


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(OptionError, match="steps"):
        assert_exact_resume(exact_trainings.that_raises, steps=1)
    with pytest.raises(OptionError, match="function of a module"):
        assert_exact_resume(lambda: exact_trainings.that_raises(), steps=3)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_and_a_plain_one_go_on_from_each_other(compiled_first: bool, tmp_path: Any) -> None:
    plain: Any = torch.nn.Linear(2, 2)
    compiled: Any = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    saved, target = (compiled, plain) if compiled_first else (plain, compiled)
    with incckpt.CheckpointManager(tmp_path) as manager:
        manager.save(1, {"model": saved})
        assert manager.restore({"model": target}) == 1
        assert torch.equal(target.weight, saved.weight)
        torch.nn.init.ones_(target.weight)
        manager.save(2, {"model": target})
        assert manager.restore({"model": saved}) == 2
        assert torch.equal(saved.weight, torch.ones(2, 2))
