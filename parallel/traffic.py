"""Bytes that this rank receives by collectives, reported by the code that calls them.

    traffic = Traffic()
    ... pass it to the code that communicates ...
    traffic.received["states"], traffic.total()

It counts what a rank receives, whatever the backend's algorithm: the result of a collective less the local part of it.
Kinds name what travels; gradients on the way back have ".backward" added.
"""

from collections import Counter


class Traffic:
    """Bytes received and calls made, by kind.

    Attributes:
        received: kind → bytes.
        calls: kind → number of collectives.
    """

    def __init__(self) -> None:
        self.received: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def add(self, kind: str, received_bytes: int) -> None:
        """Count one collective of `kind` that brings `received_bytes` from other ranks."""
        if received_bytes < 0:
            raise ValueError(f"{kind}: {received_bytes} bytes")
        self.received[kind] += received_bytes
        self.calls[kind] += 1

    def total(self) -> int:
        """Bytes of all kinds."""
        return self.received.total()

    def clear(self) -> None:
        """Reset to zero."""
        self.received.clear()
        self.calls.clear()
