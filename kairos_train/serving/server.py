"""A policy behind openpi's websocket protocol, with health and metrics over HTTP on the same port.

On connecting a client is sent one msgpack map, the policy's metadata. Then every request has one reply: a map with
`actions`, `seed` and `server_timing`, or a text that says what was wrong with the request; the connection goes on
either way. `{"endpoint": "reset"}` clears the connection's history and is answered with the same map.

    GET /healthz    "OK"
    GET /metrics    Prometheus's text format

How many sockets there are at a time, and of whom: `kairos_train.serving.admission`.

Everything of a connection runs in the event loop, all arithmetic in the batcher's thread: pings are answered while the
model computes. Browsers are refused (requests with an Origin), because any page could open a socket to this machine.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hmac
import logging
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import numpy as np
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from kairos_train.basics.errors import UserError
from kairos_train.basics.log import logger
from kairos_train.serving.admission import PENDING, Admission, AdmittedConnection, Seldom
from kairos_train.serving.batching import Batcher
from kairos_train.serving.codec import decode, encode
from kairos_train.serving.metrics import CONTENT_TYPE, Metrics
from kairos_train.serving.policy import ModelInput, ObservationHistory, ServedPolicy

ENDPOINT, RESET = "endpoint", "reset"
SCHEMES = ("bearer ", "api-key ")  # the second is what openpi's client sends
OPEN_SECONDS = 10  # for a client to finish the opening handshake
CLOSE_SECONDS = 5  # to answer the closing one


@dataclass(frozen=True)
class ServerSettings:
    """How a policy is served.

    Attributes:
        token: what clients must send as `Authorization: Bearer TOKEN`; None asks for none.
        max_message_bytes: of one request; a longer one closes its connection with code 1009.
        max_batch: requests computed together at most.
        batch_window: seconds that a batch waits for more requests.
        max_connections: a connection beyond is closed with code 1013.
        max_connections_per_client: of one address; likewise.
        max_pending: sockets that are no clients: in their handshake, refused, or being closed.
        grace: seconds that accepted requests have on shutdown.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    token: str | None = None
    max_message_bytes: int = 16 * 2**20
    max_batch: int = 16
    batch_window: float = 0.002
    max_connections: int = 256
    max_connections_per_client: int = 128
    max_pending: int = PENDING
    grace: float = 30.0


@dataclass
class _Client:
    """One connection.

    Attributes:
        gone: done when the connection is closed.
        previous: seconds that the request before took, the sending of its reply included.
    """

    websocket: ServerConnection
    history: ObservationHistory
    gone: asyncio.Task
    previous: float | None = None


class PolicyServer:
    """Serves one policy; see the module. Made inside the event loop in which it runs."""

    def __init__(self, policy: ServedPolicy, settings: ServerSettings) -> None:
        self._policy, self._settings = policy, settings
        self.metrics = Metrics()
        self._metadata = encode(policy.metadata)
        self._admission = Admission(
            clients=settings.max_connections,
            per_client=settings.max_connections_per_client,
            pending=settings.max_pending,
            dropped=self._dropped,
        )
        self._full, self._exhausted, self._failed = Seldom(), Seldom(), Seldom()
        self._batcher = Batcher(
            self._act,
            max_batch=settings.max_batch,
            window=settings.batch_window,
            clients=lambda: len(self._admission),
            metrics=self.metrics,
        )

    def _act(self, windows: Sequence[ModelInput]) -> np.ndarray:
        """`ServedPolicy.act`, counting what it bounds; in the batcher's thread."""
        before = self._policy.clipped
        actions = self._policy.act(windows)
        self.metrics.clipped.inc(self._policy.clipped - before)
        return actions

    async def run(self, stop: asyncio.Event, listening: Callable[[int], None]) -> None:
        """Serve until `stop` is set; then finish the requests that were accepted, and close with code 1001.

        Args:
            listening: called with the port once clients can connect.

        Raises:
            UserError: the address cannot be listened on.
        """
        settings = self._settings
        quiet = logger.getChild("websockets")
        quiet.setLevel(logging.CRITICAL)  # its errors are clients' broken handshakes, with tracebacks
        asyncio.get_running_loop().set_exception_handler(self._loop_error)
        self._stopped = asyncio.create_task(stop.wait())
        batches = asyncio.create_task(self._batcher.run())
        try:
            server = await serve(
                self._connection,
                settings.host,
                settings.port,
                compression=None,
                origins=[None],
                process_request=self._http,
                max_size=settings.max_message_bytes,
                max_queue=1,  # one request at a time: more stay in the socket
                open_timeout=OPEN_SECONDS,
                close_timeout=CLOSE_SECONDS,
                logger=quiet,
                create_connection=functools.partial(AdmittedConnection, admission=self._admission),
            )
        except OSError as error:
            raise UserError(
                f"host={settings.host}, port={settings.port}: cannot listen there ({error.strerror})"
            ) from error
        else:
            listening(server.sockets[0].getsockname()[1])
            await asyncio.wait({self._stopped, batches}, return_when=asyncio.FIRST_COMPLETED)
            stop.set()  # also when the batches broke
            server.close(close_connections=False)  # every connection closes itself after its reply
            try:
                async with asyncio.timeout(settings.grace):
                    await server.wait_closed()
            except TimeoutError:
                logger.warning("%d connections did not end in %g s", len(self._admission), settings.grace)
                for connection in server.connections:
                    connection.transport.abort()
        finally:
            self._stopped.cancel()
            if not batches.done():
                batches.cancel()
            await asyncio.wait({batches})
        if not batches.cancelled():
            batches.result()  # it never ends by itself: raises what ended it

    # --- one connection ---

    async def _connection(self, websocket: ServerConnection) -> None:
        """Metadata, then request and reply, until either side closes."""
        if not self._admission.admit(websocket):
            self.metrics.errors.labels("connections").inc()
            most, each = self._settings.max_connections, self._settings.max_connections_per_client
            self._full.log(f"a connection is refused: there are {len(self._admission)} of {most}, {each} per client")
            await websocket.close(CloseCode.TRY_AGAIN_LATER, "too many connections")
            return
        self.metrics.connections.inc()
        client = _Client(websocket, self._policy.history(), asyncio.create_task(websocket.wait_closed()))
        try:
            await websocket.send(self._metadata)
            while (message := await self._next(websocket)) is not None:
                started = time.monotonic()
                with self.metrics.waiting.track_inprogress():
                    reply = await self._reply(client, message)
                await websocket.send(reply)
                client.previous = time.monotonic() - started
                self.metrics.latency.observe(client.previous)
            await websocket.close(CloseCode.GOING_AWAY, "server shutting down")
        except ConnectionClosed as closed:
            if closed.sent is not None and closed.sent.code == CloseCode.MESSAGE_TOO_BIG:
                self.metrics.errors.labels("size").inc()
        except Exception:  # a fault of this server; the library would close without a word
            self.metrics.errors.labels("internal").inc()
            self._failed.log("a connection failed", level=logging.ERROR, exc_info=True)
            raise
        finally:
            client.gone.cancel()
            self._admission.release(websocket)
            self.metrics.connections.dec()

    async def _next(self, websocket: ServerConnection) -> str | bytes | None:
        """The next message; None when the server is stopped before there is one."""
        receive = asyncio.create_task(websocket.recv())
        await asyncio.wait({receive, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if receive.done():
            return receive.result()
        receive.cancel()
        await asyncio.wait({receive})
        return None if receive.cancelled() else receive.result()

    async def _reply(self, client: _Client, message: str | bytes) -> str | bytes:
        """The reply to one message: bytes, or a text when it could not be served."""
        kind = "message"
        try:
            if isinstance(message, str):
                raise UserError("message: is a text frame; send binary frames of msgpack")
            values = decode(message)
            kind = "observation"
            if isinstance(values, dict) and ENDPOINT in values:
                return self._endpoint(client, values)
            observation = self._policy.reader.read(values)
            answer = self._batcher.submit(client.history, observation)
            await asyncio.wait({answer, client.gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():  # a client that goes away takes its request with it
                answer.cancel()
                raise client.websocket.protocol.close_exc
            actions, seconds = answer.result()
        except UserError as error:
            self.metrics.errors.labels(kind).inc()
            return str(error)
        except ConnectionClosed:
            raise
        except Exception:
            self.metrics.errors.labels("internal").inc()
            self._failed.log("a request failed", level=logging.ERROR, exc_info=True)
            return "internal error: the server could not answer this request; its log says why"
        self.metrics.requests.inc()
        timing = {"infer_ms": seconds * 1000}
        if client.previous is not None:
            timing["prev_total_ms"] = client.previous * 1000
        return encode({"actions": actions, "seed": observation.seed, "server_timing": timing})

    def _endpoint(self, client: _Client, values: dict[Any, Any]) -> bytes:
        name = values[ENDPOINT]
        if len(values) > 1 or not isinstance(name, str) or name != RESET:
            raise UserError(
                f"{ENDPOINT!r}: a message with it must be {{{ENDPOINT!r}: {RESET!r}}}; leave it out to infer"
            )
        client.history.clear()
        self.metrics.resets.inc()
        return encode(values)

    def _dropped(self) -> None:
        self.metrics.errors.labels("handshake").inc()
        self._full.log(f"idle sockets are closed: more than {self._settings.max_pending} are in their handshake")

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """What the event loop could not tell anybody: without file numbers it says so for every socket."""
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
            self._exhausted.log(f"a socket could not be accepted ({error.strerror}); tried again after a second")
        else:
            loop.default_exception_handler(context)

    # --- HTTP ---

    def _http(self, connection: ServerConnection, request: Request) -> Response | None:
        """A response for plain requests and wrong tokens; None goes on with the websocket's handshake."""
        path = request.path.split("?")[0]
        if path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self.metrics.errors.labels("token").inc()
            response = connection.respond(HTTPStatus.UNAUTHORIZED, "Send the token as Authorization: Bearer TOKEN\n")
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        if path == "/metrics":
            response = connection.respond(HTTPStatus.OK, self.metrics.text().decode())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        if "Upgrade" not in request.headers:
            return connection.respond(HTTPStatus.NOT_FOUND, "There are /healthz, /metrics and a websocket here\n")
        return None

    def _authorized(self, request: Request) -> bool:
        """Whether the one Authorization header holds the token, compared in time that does not depend on it."""
        if self._settings.token is None:
            return True
        sent = request.headers.get_all("Authorization")
        if len(sent) != 1:
            return False
        scheme = next((scheme for scheme in SCHEMES if sent[0].lower().startswith(scheme)), None)
        if scheme is None:
            return False
        token = sent[0][len(scheme) :].strip()
        return hmac.compare_digest(token.encode("utf-8", "replace"), self._settings.token.encode())


def run_server(policy: ServedPolicy, settings: ServerSettings, listening: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM; a second signal ends the process at once. Runs in the main thread.

    Raises:
        UserError: as `PolicyServer.run`.
    """

    async def main() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)

        def on_signal() -> None:
            stop.set()
            for number in signals:
                loop.remove_signal_handler(number)

        for number in signals:
            loop.add_signal_handler(number, on_signal)
        await PolicyServer(policy, settings).run(stop, listening)

    asyncio.run(main())
