"""Which of the reader's checks the fuzzer would miss: ``python -m tests.fuzz.power``.

One check at a time is taken out, and stores are fuzzed until one is caught or `--stores` have passed. `reading`, which
turns any other exception into an error of incckpt's, is always out as well: it would hide what a check lets through.
Alone it is not missed, so what shows is due to the check.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch

from incckpt.state.tree import FORMS
from tests.fuzz import stores
from tests.simulation.edits import Edit, EditError

__all__ = ["CHECKS", "READING", "Check", "caught_by", "without"]


class Check(NamedTuple):
    """A check of the reader's.

    Attributes
    ----------
    what
        What it is about.
    place
        Where it is: ``module:function`` or ``module:class.function``.
    statement
        A part of its condition, of its call, or of the errors that it catches (``except …``).
    change
        The change of `tests.fuzz.stores` that it is for, and
    way
        the use: the stores tried are changed and used in this way, to be sparing.
    why
        Why nothing misses it, where nothing does: what else refuses the same stores.
    also
        What else refuses the same stores, taken out together with it.
    """

    what: str
    place: str
    statement: str
    change: str = "of_a_manifest"
    way: str = "load"
    why: str = ""
    also: tuple[Check, ...] = ()


READING = Check(
    "errors that are not ours, at the border",
    "store.untrusted:reading",
    "",
    why="the guards before it leave it nothing; it is there for what they do not know yet",
)

CHECKS = [
    READING,
    Check("an object's identity", "codec.objects:decode", "header.identity != identity", "of_bytes"),
    Check(
        "an object's identity, read in place",
        "codec.objects:decode_in_place",
        "header.identity != identity",
        "of_bytes",
    ),
    Check("a frame's digest", "codec.objects:_check", "found != right", "of_bytes"),
    Check(
        "the header's checksum",
        "codec.header:read_header",
        "zlib.crc32",
        "of_bytes",
    ),
    Check("the header's element size and flags", "codec.header:read_header", "itemsize not in", "of_an_object"),
    Check("a frame's way and size", "codec.header:read_header", "way >= len(WAYS)", "of_an_object"),
    Check(
        "raw bytes of a chunk and of its object",
        "codec.objects:decode_frames",
        "len(target) != end - origin",
        "of_an_object",
    ),
    Check(
        "an object's length and its header's",
        "codec.objects:decode_frames",
        "len(source) != coded_end - coded_origin",
        "of_an_object",
        also=(Check("the same, of a whole object", "codec.objects:decode", "header.offsets[-1] != len(view)"),),
    ),
    Check("the base of a delta", "codec.objects:_base_of", "base.identity != header.base", "of_an_object"),
    Check(
        "the base's length",
        "codec.objects:_base_of",
        "len(view) != nbytes",
        "of_an_object",
        why="a reader decodes the base to memory as long as the chunk; it is for other callers",
    ),
    Check(
        "an object's size",
        "store.objects:_check_size",
        "found != size",
        "of_a_size",
    ),
    Check("a range's pieces within chunks", "store.manifest:range_from_json", "chunk >= len(chunks)"),
    Check("a range's pieces fill it", "store.manifest:range_from_json", "sum("),
    Check("a chunk's identity", "store.manifest:_identity", "fullmatch"),
    Check("a nonce", "store.manifest:_nonce", "fullmatch"),
    Check("a ref's name and key", "store.refs:Ref.from_json", "rpartition", "of_a_name", way="list"),
    Check("a ref's manifest is its own", "store.store:Store._read_manifest", "found != ref.name"),
    Check("a document's checksum", "store.document:parse_document", "zlib.crc32", "of_bytes", way="list"),
    Check(
        "a document is an object",
        "store.document:as_mapping",
        "isinstance(value, dict)",
        "of_a_document",
        way="list",
    ),
    Check("a metric is a number", "store.document:decode_float", "except OverflowError", "of_a_document", way="list"),
    Check("JSON that Python refuses", "store.document:parse_document", "except (ValueError, Rec", "of_text"),
    Check("the limit on memory", "store.untrusted:MemoryLimit.check", "nbytes > limit"),
    Check("the limit on manifests", "store.store:Store._read_manifest", "read_header", "of_padding"),
    Check("the limit on packed values", "run.contents:read_packed", "reader.memory.check", "of_repetition"),
    Check("the limit on states", "run.restore:load_state", "reader.memory.check", "of_repetition"),
    Check("the limit on chunks", "run.reader:Reader.read", "self.memory.check", way="verify"),
    Check("strides and offsets within the range", "state.entries:_fault", "entry.offset + low < 0", "of_a_shape"),
    Check("a packed tensor fills its range", "state.entries:_fault", "entry.offset or math.prod", "of_a_shape"),
    Check("a tensor's sizes in 64 bits", "state.entries:_fault", "max(nbytes", "of_a_shape"),
    Check("negative strides", "state.entries:_fault", "step < 0", "of_a_shape", way="restore"),
    Check("dimensions and strides", "state.entries:_fault", "len(shape) != len(stride)", "of_a_shape"),
    Check("tensors agree how a range is packed", "state.entries:check_entries", "packings.setdefault", "of_a_shape"),
    Check("which dtypes there are", "state.entries:_dtype", "not in TORCH_DTYPES"),
    Check("nesting", "state.tree:_Parser.tree", "MAX_DEPTH", "of_a_node"),
    Check("a tensor is named once", "state.tree:_Parser._tensor", "in self._seen", "of_a_reference"),
    Check("a packed value is named once", "state.tree:_Parser.packed", "in self._seen_packed", "of_a_node"),
    Check("a tensor that is named is there", "state.tree:_Parser._tensor", "not 0 <=", "of_a_reference"),
    Check("a packed value that is named is there", "state.tree:_Parser.packed", "not 0 <=", "of_a_reference"),
    Check("default factories", "state.tree:_factory", "DEFAULT_FACTORIES", "of_a_reference"),
    Check("values that Python refuses", "state.tree:_Parser.tree", "except (ValueError, TypeError", "of_a_reference"),
    Check("packed values that are malformed", "state.packing:unpack", "except Malformed", "of_chunks"),
    Check("packed text", "state.packing:_value_of", "except UnicodeDecodeError", "of_chunks"),
    Check("devices that torch lacks", "state.plain:decode_device", "except RuntimeError", "of_a_reference"),
    Check(
        "a generator's state",
        "state.build:set_generator_state",
        "except RuntimeError",
        "of_chunks",
        way="restore",
    ),
    Check("what cannot be built", "state.build:Builder.value", "except IncckptError", "of_a_reference"),
    Check("pickles", "state.build:Builder._unpickle", "self._allow_pickle", "of_a_node"),
    Check(
        "a collection stops at a name that is no ref's",
        "store.gc:Collector._look",
        "name is None",
        "of_a_name",
        way="collect",
        why="what lies there is then read as a ref, and refused: a ref says its name; this one says why sooner",
    ),
    Check(
        "a collection stops at an unreadable ref",
        "store.gc:Collector._read_needs",
        "stop",
        "of_a_size",
        way="collect",
    ),
    Check("condemned keys are text", "store.refs:CondemnedLists.parse", "isinstance", "of_a_document", way="collect"),
]


class _Removal(Edit):
    """A function without the statement whose condition, call or handler contains `diff`."""

    def edited(self, tree: ast.Module) -> ast.Module:
        found = []
        for node in ast.walk(tree):
            for field in ("body", "orelse"):
                body = getattr(node, field, None)
                if isinstance(body, list):
                    found += [(body, at) for at, one in enumerate(body) if self.diff in _head(one)]
        if len(found) != 1:
            raise EditError(f"{self.name} has {len(found)} times: {self.diff}")
        body, at = found[0]
        removed = body[at]
        body[at : at + 1] = (
            removed.body if isinstance(removed, ast.Try)
            else removed.orelse if isinstance(removed, ast.If) and removed.orelse
            else [ast.Pass()]
        )  # fmt: skip
        return tree


def _head(statement: ast.stmt) -> str:
    """Return the part of a statement that tells what it checks."""
    if isinstance(statement, ast.If):
        return ast.unparse(statement.test)
    if isinstance(statement, ast.Expr):
        return ast.unparse(statement.value)
    if isinstance(statement, ast.Try):
        return " ".join(f"except {ast.unparse(one.type)}" for one in statement.handlers if one.type is not None)
    return ""


@contextmanager
def without(*checks: Check) -> Iterator[None]:
    """Take checks out for a while."""
    with ExitStack() as stack:
        for check in dict.fromkeys(checks):
            module_name, _, path = check.place.partition(":")
            owner: object = importlib.import_module(f"incckpt.{module_name}")
            *classes, name = path.split(".")
            for one in classes:
                owner = getattr(owner, one)
            if check is READING:
                original = owner.reading  # type: ignore[attr-defined]
                for key, module in list(sys.modules.items()):
                    if key.startswith("incckpt.") and getattr(module, "reading", None) is original:
                        stack.enter_context(mock.patch.object(module, "reading", return_value=contextlib.nullcontext()))
            elif check.statement == "stop":  # deletes as if an unreadable ref needed nothing
                stack.enter_context(_Stopless(owner, name, "").made())
            else:
                original = vars(owner)[name]
                stack.enter_context(_Removal(owner, name, check.statement).made())
                forms = {members: vars(owner)[name] for members, form in FORMS.items() if form is original}
                stack.enter_context(mock.patch.dict(FORMS, forms))
        yield


class _Stopless(Edit):
    """A function that returns ``None`` where it raised what it caught."""

    def edited(self, tree: ast.Module) -> ast.Module:
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                node.body = [ast.Return(ast.Constant(None)) if isinstance(one, ast.Raise) else one for one in node.body]
        return tree


def caught_by(check: Check, count: int) -> tuple[int, str] | None:
    """Return the first store that shows that a check is gone, and what it shows; ``None`` if none of `count` does."""
    with without(READING, check, *check.also), stores.watched():
        for number in range(count):
            try:
                stores.check_store(number, getattr(stores, check.change), check.way)
            except BaseException as error:  # noqa: BLE001 -- whatever it is, it is the finding
                return number, f"{type(error).__name__}: {error}".partition("\n")[0]
    return None


def table(count: int, only: str) -> int:
    """Print which checks are missed; return how many are not, and have no reason."""
    caught = explained = silent = 0
    print(f"{'taken out':48} store  shows", flush=True)
    for check in CHECKS:
        if only not in check.what:
            continue
        found = caught_by(check, count)
        caught += found is not None
        explained += found is None and bool(check.why)
        silent += found is None and not check.why
        number, shows = found or ("-", check.why or "NOTHING")
        print(f"{check.what:48} {number:>5}  {shows:.100}", flush=True)
    print(f"{caught} caught, {explained} explained, {silent} neither; {count} stores for each at most", flush=True)
    return silent


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=int, default=3000, help="to try for each check (3000)")
    parser.add_argument("--only", default="", help="checks whose description contains this")
    given = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    stores.prepared()
    result: list[int] = []
    worker = threading.Thread(target=lambda: result.append(table(given.stores, given.only)))
    stores.alarm_raises_in(worker)
    worker.start()
    worker.join()
    return result[0] if result else 1


if __name__ == "__main__":
    sys.exit(min(main(), 100))
