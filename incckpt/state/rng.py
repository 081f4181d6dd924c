"""The global random number generators as one value of a state."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from incckpt.errors import StateMismatchError

__all__ = ["RngState"]

log = logging.getLogger(__name__)

_MT19937_WORDS = 624
_PHILOX_WORDS = 4


class RngState:
    """The state of the global generators of Python, numpy and torch, on the CPU and on every CUDA device.

    Put one into the state to save and restore the generators with the rest; it holds nothing itself. A restore sets
    them last, after everything that might draw numbers while it loads.

    CUDA generators are saved only if CUDA is in use, since looking at them would start it. If the number of devices
    differs at restore, the generators that both have are set, and the difference is logged.

    Examples
    --------
    >>> state = {"model": model, "optimizer": optimizer, "rng": RngState()}  # doctest: +SKIP
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all generators, as arrays, tensors and plain values."""
        version, internal, gauss_next = random.getstate()
        cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return {
            "python": {"version": version, "state": np.array(internal, np.uint32), "gauss_next": gauss_next},
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set all generators to what `state_dict` returned.

        Raises
        ------
        StateMismatchError
            If `state` is nothing that `state_dict` returned, or this Python or numpy has other generators. Some
            generators may already be set.
        """
        try:
            python, cuda = state["python"], [tensor.cpu() for tensor in state["cuda"]]
            _check_numpy(state["numpy"])
            random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss_next"]))
            np.random.set_state(state["numpy"])
            torch.set_rng_state(state["torch"].cpu())
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
            raise StateMismatchError(f"cannot set the random number generators: {error!r}") from error
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index, tensor in enumerate(cuda[:devices]):
            torch.cuda.set_rng_state(tensor, index)
        if cuda and len(cuda) != devices:
            log.warning(
                "the random number generators of %d CUDA devices were saved, there are %d here: %s",
                len(cuda),
                devices,
                f"those of the first {min(len(cuda), devices)} were set, no others" if devices else "none was set",
            )


def _check_numpy(state: Any) -> None:
    """Refuse positions outside the generator's tables, since numpy would read wherever they point."""
    tables = []
    if state["bit_generator"] == "MT19937":
        tables.append((state["state"]["key"], state["state"]["pos"], _MT19937_WORDS))
    elif "buffer_pos" in state:  # Philox
        tables.append((state["buffer"], state["buffer_pos"], _PHILOX_WORDS))
    for words, position, size in tables:
        if np.shape(words) != (size,) or isinstance(position, bool) or not 0 <= position.__index__() <= size:
            raise ValueError(f"position {position!r} in a table of shape {np.shape(words)}, not {(size,)}")
