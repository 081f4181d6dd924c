"""What the local tier of a run goes on from in the bucket: whose word counts after a restart.

The bucket's run may be written from elsewhere, after this machine was taken for lost. Its checkpoints are newer then
than what this disk has, whatever their steps. So the local store remembers which of the bucket's its own ones follow.
"""

from __future__ import annotations

from dataclasses import dataclass

from incckpt.errors import CorruptionError, KeyNotFoundError, OptionError
from incckpt.store.document import Fields, dump_document, parse_document
from incckpt.store.lineage import Lineage
from incckpt.store.refs import RefName
from incckpt.store.rereading import reread
from incckpt.store.store import Store
from incckpt.store.untrusted import fetch

__all__ = ["Follows"]


@dataclass(frozen=True)
class Follows:
    """What of the bucket a local tier goes on from.

    Attributes
    ----------
    store
        The id of the bucket's store; empty where it was not there yet.
    attempt
        The last attempt at the bucket's run that was made from here; 0 if there was none.
    latest
        The bucket's latest checkpoint when the local tier went on from it; empty if it had none.
    """

    store: str = ""
    attempt: int = 0
    latest: str = ""

    @staticmethod
    def key(run: str) -> str:
        """Where a local store keeps this."""
        return f"tiers/{run}"

    @classmethod
    def read(cls, local: Store, run: str) -> Follows | None:
        """Return what a local store says; ``None`` if it was never a tier.

        Raises
        ------
        CorruptionError, FormatError
            If the document is damaged, or of a later version.
        """
        return reread(lambda: cls._read(local, run))

    @classmethod
    def _read(cls, local: Store, run: str) -> Follows | None:
        key = cls.key(run)
        try:
            data = fetch(local.backend, key)
        except KeyNotFoundError:
            return None
        fields = Fields(parse_document(data, "tier", key), key)
        latest = fields.string("latest")
        if latest and RefName.parse(latest) is None:
            raise CorruptionError(f"{key}: not the name of a ref: {latest!r}")
        return cls(fields.string("store"), fields.count("attempt"), latest)

    def put(self, local: Store, run: str) -> None:
        """Write this into a local store."""
        fields = {"store": self.store, "attempt": self.attempt, "latest": self.latest}
        local.backend.put(self.key(run), dump_document("tier", fields))

    def check(self, local: Store, bucket: Store) -> None:
        """Check that it is this bucket that the local tier belongs to.

        Raises
        ------
        OptionError
        """
        if self.store and self.store != bucket.id:
            raise OptionError(
                f"{local.backend.url} is the local tier of another store than {bucket.backend.url} (its id is "
                f"{self.store}, this one's is {bucket.id}); give another folder as local="
            )

    def continues(self, bucket: Lineage) -> bool:
        """Whether the local checkpoints go on from what is the bucket's latest now."""
        latest = bucket.latest
        return latest is None or str(latest) == self.latest or latest.attempt == self.attempt
