"""Which connections a server keeps, before and after they have said who they are; and how much of that it logs.

A socket that has not finished its handshake costs a file number and promises nothing. So of these there are never more
than a few: one more, and the oldest goes, of the address that has most of them. A request that is in earnest takes
milliseconds, so the newest always gets through, `/healthz` among them. Behind its handshake a connection is a client:
it may be silent for as long as it answers pings, as a robot is between two episodes.
"""

from __future__ import annotations

import logging
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection

from kairos_train.basics.errors import UserError
from kairos_train.basics.log import logger

PENDING = 64
"""Sockets that are in their handshake, have been refused, or are being closed."""

RESERVE = 512
"""File numbers beside clients and pending sockets: of the process itself, and of sockets that the event loop accepts
within one round, before it asks anybody."""

QUIET_SECONDS = 60.0


class Admission:
    """The sockets of a server. Used from its event loop.

    Args:
        clients: connections behind their handshake, at most.
        per_client: of one address, at most.
        dropped: called for each socket that is closed to make room.
    """

    def __init__(self, *, clients: int, per_client: int, pending: int, dropped: Callable[[], Any]) -> None:
        self._most, self._per_client, self._most_pending, self._dropped = clients, per_client, pending, dropped
        self._pending: dict[ServerConnection, str] = {}  # the oldest first, with its address
        self._clients: dict[ServerConnection, str] = {}

    def __len__(self) -> int:
        """Clients."""
        return len(self._clients)

    def opened(self, connection: ServerConnection) -> None:
        """A socket was accepted."""
        self._wait(connection, _address(connection))

    def admit(self, connection: ServerConnection) -> bool:
        """Whether a connection that has finished its handshake becomes a client."""
        address = _address(connection)
        same = sum(other == address for other in self._clients.values())
        if len(self._clients) >= self._most or same >= self._per_client:
            return False
        self._pending.pop(connection, None)
        self._clients[connection] = address
        return True

    def release(self, connection: ServerConnection) -> None:
        """A client is being closed: its socket stays until the other side has said goodbye."""
        if (address := self._clients.pop(connection, None)) is not None:
            self._wait(connection, address)

    def closed(self, connection: ServerConnection) -> None:
        """A socket is gone."""
        self._pending.pop(connection, None)
        self._clients.pop(connection, None)

    def _wait(self, connection: ServerConnection, address: str) -> None:
        self._pending[connection] = address
        if len(self._pending) > self._most_pending:
            most = Counter(self._pending.values()).most_common(1)[0][0]
            oldest = next(other for other, whose in self._pending.items() if whose == most)
            del self._pending[oldest]
            oldest.transport.abort()
            self._dropped()


class AdmittedConnection(ServerConnection):
    """A connection that `Admission` knows from the moment in which its socket is accepted."""

    def __init__(self, *args: Any, admission: Admission, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._admission = admission

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._admission.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._admission.closed(self)


def _address(connection: ServerConnection) -> str:
    """The other side's; "" where it is gone already."""
    peer = connection.transport.get_extra_info("peername")
    return peer[0] if peer else ""


class Seldom:
    """A log line for what strangers can cause as often as they like: at once, then one a minute that says how often.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._logged: float | None = None
        self._count = 0

    def log(self, text: str, *, level: int = logging.WARNING, exc_info: Any = None) -> None:
        """Log it, or count it."""
        self._count += 1
        now = self._clock()
        if self._logged is not None and now - self._logged < QUIET_SECONDS:
            return
        times = f" ({self._count} times since this was last logged)" if self._count > 1 else ""
        logger.log(level, "%s%s", text, times, exc_info=exc_info)
        self._logged, self._count = now, 0


def raise_file_numbers(connections: int) -> None:
    """Let this process open as many files as its sockets and its own files need.

    Args:
        connections: clients at most.

    Raises:
        UserError: the system does not allow as many.
    """
    needed = connections + PENDING + RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"max-connections={connections}: needs {needed} file numbers, and this process may have {hard}; "
                f"lower it to {max(hard - PENDING - RESERVE, 0)}, or raise the limit (ulimit -Hn)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
