"""The rules of `tests.simulation.rules` say what the code says, whatever its locals are called, and each is needed."""

from __future__ import annotations

import ast
import builtins
import re

import pytest

from incckpt.run.attempt import Attempt
from incckpt.testing.simulation import Violation
from tests.simulation.edits import Edit, EditError
from tests.simulation.rules import RULES, without
from tests.simulation.scenarios import SCENARIOS
from tests.simulation.world import simulated


class _RenameLocals(ast.NodeTransformer):
    """Gives every local another name, that is every name which the function binds."""

    def __init__(self, tree: ast.AST) -> None:
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        self._bound = bound - {"self", *vars(builtins)}

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(f"{node.id}_renamed", node.ctx) if node.id in self._bound else node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(f"{node.arg}_renamed", node.annotation) if node.arg in self._bound else node


@pytest.mark.parametrize("name", RULES)
def test_a_rule_quotes_what_is_there(name: str) -> None:
    assert RULES[name].caught in SCENARIOS
    with without(name):
        pass


@pytest.mark.parametrize("name", RULES)
def test_a_rule_survives_renamed_locals(name: str) -> None:
    for edit in RULES[name].without:
        tree = edit.tree()
        before = ast.unparse(_RenameLocals(tree).visit(tree))
        assert ast.unparse(edit.edited(tree)) != before


def test_what_is_quoted_and_not_there_is_told() -> None:
    with pytest.raises(EditError, match=r"Attempt.start has 0 times: self\._run\.finish\(\)"):
        Edit(Attempt, "start", "- self._run.finish()\n+ pass").edited(Edit(Attempt, "start", "").tree())


def test_an_edit_follows_the_names_of_the_function() -> None:
    edit = Edit(Attempt, "holds", "- return any(x.step == y for x in tuple(self._history))\n+ return y")
    assert ast.unparse(edit.edited(edit.tree())).endswith("return step")


def test_an_edit_keeps_the_body_of_a_header() -> None:
    edit = Edit(Attempt, "start", "- if self._number:\n+ if True:")
    assert "if True:\n        return" in ast.unparse(edit.edited(edit.tree()))


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_without_a_rule_some_promise_is_broken(name: str) -> None:
    rule = RULES[name]
    with simulated(), without(name), pytest.raises(Violation) as caught:
        SCENARIOS[rule.caught].explore(**{**rule.bounds, "limit": 200_000})
    assert not re.search("(Name|Attribute|Type|Import|Assertion)Error", str(caught.value)), (
        "the edit is wrong, not the rule"
    )
    print(f"without {name!r}: {str(caught.value).splitlines()[0]}")
