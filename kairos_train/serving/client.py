"""A synchronous client of the policy server; needs websockets, msgpack and numpy, no torch.

with PolicyClient("ws://127.0.0.1:8000") as policy:
    actions = policy.infer({"observation.images.top": picture, "observation.state": state, "prompt": "…"})["actions"]
    policy.reset()    # before the next episode
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from kairos_train.basics.errors import UserError
from kairos_train.serving.codec import decode, encode

MAX_REPLY_BYTES = 16 * 2**20
FIRST_DELAY, LONGEST_DELAY = 0.05, 2.0  # seconds between attempts to connect, doubling
FINAL_CODES = (1002, 1007, 1008, 1009)  # closings that sending the same again would bring about again


class PolicyError(RuntimeError):
    """The server answered a request with an error; the connection goes on."""


class PolicyLost(PolicyError):
    """The server cannot be reached, did not answer in time, or went away with the history of this episode."""


class PolicyClient:
    """One connection to a server, made when it is needed and again when it was lost.

    A request whose connection breaks is sent once more over a new one, unless the policy keeps a history of this
    episode on the server, which is lost then: PolicyLost is raised, and the episode must begin again.

    Args:
        url: ws://HOST:PORT, or wss:// through a proxy with TLS.
        token: sent as `Authorization: Bearer TOKEN`.
        timeout: seconds for one reply; may be changed later.
        connect_timeout: seconds for connecting, during which a server that is not up yet is tried again.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout: float = 30.0, connect_timeout: float = 60.0
    ) -> None:
        self._url, self.timeout, self._connect_timeout = url, timeout, connect_timeout
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._connection: ClientConnection | None = None
        self._metadata: dict[str, Any] | None = None

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, Any]:
        """What the server says of its policy. Connects if need be."""
        self._connected()
        return self._metadata

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's reply to one observation: `actions` float32 (A, D), `seed`, `server_timing`.

        Raises:
            PolicyError: the server refused the observation; says why.
            PolicyLost: no server, no reply in time, or a connection that broke with a history.
            UserError: a wrong token, or an observation that cannot be encoded.
        """
        return self._ask(encode(dict(observation)))

    def reset(self) -> None:
        """Begin an episode: the server forgets what this client has shown it. Raises as `infer`."""
        if self._connection is not None:  # a new connection has no history
            self._ask(encode({"endpoint": "reset"}), keeps_history=False)

    def close(self) -> None:
        """End the connection; a later call makes a new one."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _ask(self, request: bytes, *, keeps_history: bool = True) -> dict[str, Any]:
        try:
            reply = self._exchange(request)
        except ConnectionClosed as lost:
            final = lost.rcvd is not None and lost.rcvd.code in FINAL_CODES
            if final or (keeps_history and self._metadata.get("given_frames", 1) > 1):
                raise PolicyLost(f"{self._url}: the connection broke ({lost}); begin the episode again") from lost
            try:
                reply = self._exchange(request)
            except ConnectionClosed as again:
                raise PolicyLost(f"{self._url}: the connection broke twice ({again})") from again
        if isinstance(reply, str):
            raise PolicyError(reply)
        return decode(reply)

    def _exchange(self, request: bytes) -> str | bytes:
        connection = self._connected()
        try:
            connection.send(request)
            return connection.recv(timeout=self.timeout)
        except TimeoutError as late:
            self.close()  # its reply would be taken for that of the next request
            raise PolicyLost(f"{self._url}: no reply in {self.timeout:g} s; is the server overloaded?") from late
        except ConnectionClosed:
            self.close()
            raise

    def _connected(self) -> ClientConnection:
        """The open connection; makes one, waiting for a server that is not up yet."""
        if self._connection is not None:
            return self._connection
        deadline, delay = time.monotonic() + self._connect_timeout, FIRST_DELAY
        while True:
            left = deadline - time.monotonic()
            try:
                self._connection, metadata = self._open(left)
                break
            except InvalidStatus as refused:
                if refused.response.status_code == 401:
                    raise UserError(f"{self._url}: the server refuses the token; give the one of its file") from refused
                reason: Exception = refused
            except (OSError, ConnectionClosed, InvalidHandshake) as error:  # TimeoutError is an OSError
                reason = error
            if left <= delay:
                raise PolicyLost(f"{self._url}: no policy server in {self._connect_timeout:g} s ({reason})") from reason
            time.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)
        if self._metadata not in (None, metadata):
            self.close()
            raise PolicyLost(f"{self._url}: now serves another policy; begin again with a new client")
        self._metadata = metadata
        return self._connection

    def _open(self, seconds: float) -> tuple[ClientConnection, dict[str, Any]]:
        """A connection and the metadata it begins with."""
        connection = connect(
            self._url,
            compression=None,
            additional_headers=self._headers,
            open_timeout=seconds,
            max_size=MAX_REPLY_BYTES,
        )
        try:
            return connection, decode(connection.recv(timeout=seconds))
        except BaseException:
            connection.close()
            raise
