"""Edits of functions that survive another layout, other comments and renamed locals: syntax trees are compared."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any
from unittest import mock

__all__ = ["Edit", "EditError"]


_COMPOUND = (ast.If, ast.For, ast.While, ast.FunctionDef)


class EditError(AssertionError):
    """The function does not have what an edit quotes."""


@dataclass(frozen=True)
class Edit:
    """A function with other statements.

    Attributes
    ----------
    owner, name
        The class or module, and the function in it.
    diff
        Statements that begin with ``-`` stand in the function exactly once, in a row; those with ``+`` replace them. An
        ``if``, ``while``, ``for`` or ``def`` without a body stands for one with any body, and keeps it. Names of locals
        may differ from the function's: those of the ``+`` follow those of the ``-``, in all hunks alike.
    """

    owner: Any
    name: str
    diff: str

    @contextmanager
    def made(self) -> Iterator[None]:
        """Put the edited function in place for a while.

        Raises
        ------
        EditError
            If the function does not have what is quoted.
        """
        function = self.function()
        namespace = vars(sys.modules[function.__module__])
        local: dict[str, Any] = {}
        tree = self.edited(self.tree())
        tree.body.insert(0, ast.ImportFrom("__future__", [ast.alias("annotations")], 0))
        code = compile(ast.fix_missing_locations(tree), f"<edited {self.name}>", "exec")
        assert isinstance(code, CodeType)
        exec(code, namespace, local)
        with ExitStack() as stack:
            for place in self._places():
                stack.enter_context(mock.patch.object(place, self.name, local[self.name]))
            yield

    def function(self) -> Any:
        """Return the function as it is."""
        original = inspect.getattr_static(self.owner, self.name)
        return original.__func__ if isinstance(original, staticmethod | classmethod) else original

    def tree(self) -> ast.Module:
        """Return its syntax."""
        return ast.parse(textwrap.dedent(inspect.getsource(self.function())))

    def edited(self, tree: ast.Module) -> ast.Module:
        """Return `tree` with the edit made.

        Raises
        ------
        EditError
        """
        known = {*vars(sys.modules[self.function().__module__]), *vars(builtins), "self", "cls"}
        names: dict[str, str] = {}
        for old, new in self._hunks():
            found = [
                (body, at, bound)
                for body in _bodies(tree)
                for at in range(len(body) - len(old) + 1)
                if (bound := _match(old, body[at : at + len(old)], names, known)) is not None
            ]
            if len(found) != 1:
                quoted = "; ".join(ast.unparse(statement) for statement in old)
                raise EditError(f"{self.owner.__name__}.{self.name} has {len(found)} times: {quoted}")
            body, at, names = found[0]
            kept = [statement.body for statement in body[at : at + len(old)] if isinstance(statement, _COMPOUND)]
            made = [_Renamed(names).visit(statement) for statement in new]
            for statement in made:
                if isinstance(statement, _COMPOUND) and _is_header(statement):
                    statement.body = kept[0]
            body[at : at + len(old)] = made
        return tree

    def _hunks(self) -> Iterator[tuple[list[ast.stmt], list[ast.stmt]]]:
        old: list[str] = []
        new: list[str] = []
        for line in textwrap.dedent(self.diff).strip("\n").splitlines():
            if line.startswith("-"):
                if new:
                    yield _parse(old), _parse(new)
                    old, new = [], []
                old.append(line[2:])
            else:
                assert line.startswith("+"), line
                new.append(line[2:])
        yield _parse(old), _parse(new)

    def _places(self) -> list[Any]:
        """Return the class, or every module that has imported the function."""
        if inspect.isclass(self.owner):
            return [self.owner]
        original = getattr(self.owner, self.name)
        modules = [module for name, module in sys.modules.items() if name.split(".")[0] in ("incckpt", "tests")]
        return [module for module in modules if getattr(module, self.name, None) is original]


def _parse(lines: Sequence[str]) -> list[ast.stmt]:
    """Return the statements of a hunk; those without a body get ``...`` for one."""
    text = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        indent = len(line) - len(line.lstrip())
        open_header = line.endswith(":") and len(following) - len(following.lstrip()) <= indent
        text += line + (" ..." if open_header else "") + "\n"
    return ast.parse(text).body


def _is_header(statement: ast.AST) -> bool:
    return isinstance(statement, _COMPOUND) and [ast.unparse(inner) for inner in statement.body] == ["..."]


def _bodies(tree: ast.Module) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(node, field, None)
            if isinstance(body, list):
                yield body


def _match(
    old: Sequence[ast.stmt], found: Sequence[ast.stmt], names: dict[str, str], known: set[str]
) -> dict[str, str] | None:
    """Return what the locals of the quotation are called in the function, or ``None`` if it says something else."""
    bound = dict(names)
    return bound if _same(list(old), list(found), bound, known) else None


def _same(old: Any, found: Any, bound: dict[str, str], known: set[str]) -> bool:
    if type(old) is not type(found):
        return False
    if isinstance(old, list):
        return len(old) == len(found) and all(_same(*pair, bound, known) for pair in zip(old, found, strict=True))
    if not isinstance(old, ast.AST):
        return bool(old == found)
    if isinstance(old, ast.Name):
        return _bind(old.id, found.id, bound, known)
    if isinstance(old, ast.arg):
        return _bind(old.arg, found.arg, bound, known)
    fields = [field for field in old._fields if field not in ("ctx", "type_comment", "decorator_list")]
    if _is_header(old):
        fields = [field for field in fields if field not in ("body", "orelse")]
    return all(_same(getattr(old, field), getattr(found, field), bound, known) for field in fields)


def _bind(old: str, found: str, bound: dict[str, str], known: set[str]) -> bool:
    if old in known or found in known:
        return old == found
    if old in bound or found in bound.values():
        return bound.get(old) == found
    bound[old] = found
    return True


class _Renamed(ast.NodeTransformer):
    """Renames locals."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        """Rename."""
        return ast.Name(self._names.get(node.id, node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        """Rename."""
        return ast.arg(self._names.get(node.arg, node.arg), node.annotation)
