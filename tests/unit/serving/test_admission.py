"""Sockets that say nothing, too many of them, and what a server logs of them."""

import asyncio
import errno
import logging
import resource
import socket
import subprocess
import sys

import numpy as np
import pytest
from support.serving_server import Running, ask, in_process, in_thread, observation, open_socket, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from kairos_train.basics.errors import UserError
from kairos_train.serving.admission import PENDING, RESERVE, Seldom
from kairos_train.serving.codec import decode, encode
from kairos_train.serving.policy import ServedPolicy
from kairos_train.serving.run import read_token
from kairos_train.serving.server import PolicyServer, ServerSettings

PENDING_HERE = 8
DROPPED = 'kairos_policy_errors_total{kind="handshake"}'


@pytest.fixture(scope="module")
def policy(exported) -> ServedPolicy:
    return ServedPolicy(exported, steps=1)


def idle(server: Running, count: int, address: str = "127.0.0.1") -> list[socket.socket]:
    """Sockets that say nothing."""
    return [socket.create_connection(("127.0.0.1", server.port), source_address=(address, 0)) for _ in range(count)]


def from_address(server: Running, address: str):
    websocket = connect(server.url, compression=None, sock=idle(server, 1, address)[0])
    websocket.recv()
    return websocket


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


# --- a server ---


def test_idle_sockets_take_nothing_from_anybody(policy, caplog):
    with in_thread(policy, max_pending=PENDING_HERE) as server, open_socket(server) as robot:
        sockets = idle(server, 100)
        wait_until(lambda: server.metric(DROPPED) >= 100 - PENDING_HERE)
        assert server.get("/healthz") == "OK\n"
        assert sum(map(is_open, sockets)) <= PENDING_HERE
        assert is_open(sockets[-1]), "the oldest went"
        reply = decode(ask(robot, encode(observation(0))))  # silent until now, and a client all the same
        assert np.isfinite(reply["actions"]).all()
        for sock in sockets:
            sock.close()
    assert [record.message for record in caplog.records if "idle" in record.message] == [
        f"idle sockets are closed: more than {PENDING_HERE} are in their handshake"
    ]


def test_the_sockets_of_one_address_go_before_those_of_another(policy):
    with in_thread(policy, max_pending=PENDING_HERE) as server:
        (other,) = idle(server, 1, "127.0.0.2")
        flood = idle(server, 3 * PENDING_HERE)
        wait_until(lambda: server.metric(DROPPED) >= 2 * PENDING_HERE)
        assert is_open(other)
        other.setblocking(True)
        other.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert other.recv(12) == b"HTTP/1.1 200"
        for sock in (other, *flood):
            sock.close()


def test_a_client_has_no_more_connections_than_its_share(policy):
    with in_thread(policy, max_connections=4, max_connections_per_client=2) as server:
        mine = [open_socket(server) for _ in range(2)]
        with pytest.raises(ConnectionClosed) as closed:
            open_socket(server)
        assert closed.value.rcvd.code == 1013
        others = [from_address(server, "127.0.0.2") for _ in range(2)]
        with pytest.raises(ConnectionClosed) as closed:
            from_address(server, "127.0.0.3")
        assert closed.value.rcvd.code == 1013
        mine.pop().close()
        wait_until(lambda: server.metric("kairos_policy_connections") == 3)
        others.append(from_address(server, "127.0.0.3"))
        for websocket in (*mine, *others):
            assert isinstance(ask(websocket, encode(observation(0))), bytes)
            websocket.close()


def test_who_is_refused_and_says_no_goodbye_takes_no_room(policy):
    """Refused connections wait for the closing handshake: they count as pending."""
    with in_thread(policy, max_connections=1, max_pending=PENDING_HERE) as server, open_socket(server) as robot:
        request = "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        request += "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        sockets = idle(server, 3 * PENDING_HERE)
        for sock in sockets:
            try:
                sock.sendall(request.encode())
            except OSError:
                continue  # closed already
        wait_until(lambda: server.metric(DROPPED) >= 2 * PENDING_HERE)
        assert server.get("/healthz") == "OK\n"
        assert isinstance(ask(robot, encode(observation(0))), bytes)
        for sock in sockets:
            sock.close()


@pytest.mark.nightly
def test_a_thousand_idle_sockets_at_1024_file_numbers(exported):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # of this side of the sockets
    with in_process(exported, "--steps", "1", prefix=["prlimit", "--nofile=1024:1024"]) as (process, server):
        sockets = idle(server, 900) + idle(server, 115, "127.0.0.2")
        for _ in range(5):
            assert server.get("/healthz") == "OK\n"
        with open_socket(server) as robot:
            assert isinstance(ask(robot, encode(observation(0))), bytes)
        for sock in sockets:
            sock.close()
        process.terminate()
        assert process.stderr.read().count("\n") <= 2


# --- its log ---


def test_what_strangers_cause_is_logged_once_a_minute(caplog):
    now = [0.0]
    seldom = Seldom(lambda: now[0])
    for second in range(130):
        now[0] = second
        seldom.log("a stranger came")
    assert [record.message for record in caplog.records] == [
        "a stranger came",
        "a stranger came (60 times since this was last logged)",
        "a stranger came (60 times since this was last logged)",
    ]


def test_a_server_without_file_numbers_says_so_once(policy, caplog):
    async def main() -> None:
        server, stop = PolicyServer(policy, ServerSettings(port=0)), asyncio.Event()
        running = asyncio.create_task(server.run(stop, lambda port: None))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        for _ in range(100):
            loop.call_exception_handler(
                {"message": "accept", "exception": OSError(errno.EMFILE, "Too many open files")}
            )
        loop.call_exception_handler({"message": "something else"})
        stop.set()
        await running

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert [record.message for record in caplog.records] == [
        "a socket could not be accepted (Too many open files); tried again after a second",
        "something else",
    ]


# --- its start ---


@pytest.mark.parametrize(
    ("connections", "limits", "said"),
    [
        (256, (256, 4096), str(256 + PENDING + RESERVE)),
        (256, (2048, 4096), "2048"),
        (256, (256, 832), "832"),
        (
            257,
            (256, 832),
            "max-connections=257: needs 833 file numbers, and this process may have 832; lower it to 256",
        ),
    ],
)
def test_file_numbers_are_raised_to_what_the_sockets_need(connections, limits, said):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
from kairos_train.serving.admission import raise_file_numbers
try:
    raise_file_numbers({connections})
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(said), done.stdout


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_token_that_others_may_use_is_refused(tmp_path, mode):
    (tmp_path / "token").write_text("s3cret")
    (tmp_path / "token").chmod(mode)
    with pytest.raises(UserError, match=rf"others may use it \(mode {mode:o}\); run chmod 600 {tmp_path}/token"):
        read_token(tmp_path / "token")
    (tmp_path / "token").chmod(0o400)
    assert read_token(tmp_path / "token") == "s3cret"
