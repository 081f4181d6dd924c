"""Answers that are wrong, as an `Explorer` tries them."""

from __future__ import annotations

from collections.abc import Iterator

from incckpt.errors import KeyNotFoundError
from incckpt.testing.simulation import Failure, Reply, Request, Server

__all__ = ["PAGE", "wrong_answers"]

PAGE = b"<html>Please sign in</html>"


def wrong_answers(request: Request, truth: Reply, before: Server) -> Iterator[tuple[str, Reply]]:
    """Yield what else a request that only looks may be told, each with a word on it.

    A listing is empty, or short of one entry; a value is a web page, or seems not to be there; and each of them is
    as it was before.

    Parameters
    ----------
    truth
        The right reply.
    before
        The server as it was earlier.
    """
    told: set[Reply] = {truth}

    def another(note: str, reply: Reply) -> Iterator[tuple[str, Reply]]:
        if reply not in told:
            told.add(reply)
            yield note, reply

    if isinstance(truth, tuple):
        yield from another("empty", ())
        for index, entry in enumerate(truth):
            yield from another(f"without {entry.key}", truth[:index] + truth[index + 1 :])
    elif not isinstance(truth, Failure):
        yield from another("not found", Failure(KeyNotFoundError, f"no key {request.keys[0]!r}"))
        if request.op == "get":
            yield from another("a page", PAGE[request.start : request.end])
    yield from another("as before", before.perform(request))
