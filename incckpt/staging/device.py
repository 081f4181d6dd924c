"""Copies from device memory to the host, on a stream of their own."""

from __future__ import annotations

import torch

__all__ = ["DeviceCopies"]


class DeviceCopies:
    """Copies that wait for the work enqueued so far, but not for what training enqueues later.

    On CUDA each device has a side stream, so that copies overlap. Copies from other devices are synchronous.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._begun: set[torch.device] = set()

    def copy(self, host: torch.Tensor, source: torch.Tensor) -> None:
        """Start to copy `source` to `host`, both ``uint8[n]``; the copy is complete when `synchronize` returns."""
        device = source.device
        if device.type != "cuda":
            host.copy_(source)
            return
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if device not in self._begun:
            self._begun.add(device)
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host.copy_(source, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for the copies started."""
        for device in self._begun:
            self._streams[device].synchronize()
        self._begun.clear()
