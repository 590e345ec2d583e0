"""Bytes that collectives bring to this rank, told by the code that calls them.

    traffic = Traffic()
    ... hand it to what communicates ...
    traffic.received["states"], traffic.total()

What a rank receives is counted, whatever way the backend takes: the result of a collective less the part of it that
was here before. Kinds name what travels; gradients on the way back have ".backward" added.
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
        """One collective of `kind` that brings `received_bytes` from other ranks."""
        if received_bytes < 0:
            raise ValueError(f"{kind}: {received_bytes} bytes")
        self.received[kind] += received_bytes
        self.calls[kind] += 1

    def total(self) -> int:
        """Bytes of all kinds."""
        return self.received.total()

    def clear(self) -> None:
        """Begin again at zero."""
        self.received.clear()
        self.calls.clear()
