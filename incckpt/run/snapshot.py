"""A state as staged: all that the background needs to write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from incckpt.staging.content import Content
from incckpt.staging.layout import Layout
from incckpt.state.entries import TensorEntry, entry_to_json
from incckpt.store.document import Json

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class Snapshot:
    """A state as staged: all that the background needs to write it.

    Attributes
    ----------
    layout, contents
        How its ranges lie in chunks, and one content per chunk.
    """

    step: int
    metrics: Mapping[str, float]
    time: float
    structure: Json
    tensors: tuple[Mapping[str, Json], ...]
    layout: Layout
    contents: Sequence[Content]
    norms: Mapping[str, tuple[float, float]] | None = None

    @classmethod
    def of(
        cls,
        step: int,
        metrics: Mapping[str, float],
        time: float,
        structure: Json,
        tensors: Sequence[TensorEntry],
        layout: Layout,
        contents: Sequence[Content],
        norms: Mapping[str, tuple[float, float]] | None = None,
    ) -> Snapshot:
        """Put a snapshot together from what flattening and staging gave."""
        entries = tuple(entry_to_json(entry) for entry in tensors)
        return cls(step, metrics, time, structure, entries, layout, contents, norms)
