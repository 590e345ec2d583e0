"""The policy server over real connections: protocol, strangers' messages, tokens, batches."""

import asyncio
import concurrent.futures
import contextlib
import pickle
import socket
import threading
import urllib.error

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from support.serving_exports import config_of, write_export
from support.serving_server import CAMERA, STATE, accepted, ask, in_thread, observation, open_socket, wait_until
from test_serving_codec import JUNK, Payload, array, nested
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from kairos_train.basics.errors import UserError
from kairos_train.serving.batching import Batcher
from kairos_train.serving.client import PolicyClient, PolicyError
from kairos_train.serving.codec import decode, encode
from kairos_train.serving.metrics import Metrics
from kairos_train.serving.policy import ServedPolicy

MESSAGE_CAP = 2**18
SLOW_STEPS = 20  # long enough that requests gather while others are computed


@pytest.fixture(scope="module")
def policy(exported) -> ServedPolicy:
    return ServedPolicy(exported, steps=1)


@pytest.fixture(scope="module")
def server(policy):
    with in_thread(policy, max_message_bytes=MESSAGE_CAP) as running:
        yield running
        assert running.metric('kairos_policy_errors_total{kind="internal"}') == 0


@pytest.fixture(scope="module")
def slow(exported):
    with in_thread(ServedPolicy(exported, steps=SLOW_STEPS), max_batch=4) as running:
        yield running


class Gated(ServedPolicy):
    """A policy that computes once it is let."""

    def __init__(self, *args, **settings) -> None:
        super().__init__(*args, **settings)
        self.gate = threading.Event()

    def act(self, windows):
        assert self.gate.wait(timeout=120)
        return super().act(windows)


def expected(policy: ServedPolicy, seed: int) -> np.ndarray:
    """Actions for `observation(seed)`, computed here, alone."""
    return policy.act([policy.history().window(policy.reader.read(observation(seed)))])[0]


# --- protocol ---


def test_openpis_client_is_served(server, policy):
    client = WebsocketClientPolicy("127.0.0.1", server.port)
    assert client.get_server_metadata() == policy.metadata
    for seed in range(2):
        reply = client.infer(observation(seed))
        np.testing.assert_allclose(reply["actions"], expected(policy, seed), atol=1e-5)
        assert reply["actions"].dtype == np.float32
        assert reply["actions"].shape == (policy.metadata["horizon"], policy.metadata["action_dim"])
        assert reply["server_timing"].keys() == {"infer_ms"} | ({"prev_total_ms"} if seed else set())
        assert all(value > 0 for value in reply["server_timing"].values())
    with pytest.raises(RuntimeError, match=f"'{STATE}': is missing"):
        client.infer({CAMERA: observation(0)[CAMERA], "prompt": "push"})
    assert client.infer({"endpoint": "reset"}) == {"endpoint": "reset"}
    np.testing.assert_allclose(client.infer(observation(3))["actions"], expected(policy, 3), atol=1e-5)


def test_liberos_client_is_served(tmp_path):
    cameras = ["observation.images.image", "observation.images.wrist_image"]
    export = write_export(tmp_path / "libero", config_of(cameras=cameras, state_dim=8, action_dim=7))
    given = {
        "observation/image": np.zeros((224, 224, 3), np.uint8),
        "observation/wrist_image": np.full((224, 224, 3), 255, np.uint8),
        "observation/state": np.zeros(8),
        "prompt": "open the drawer",
    }
    with in_thread(ServedPolicy(export, steps=1)) as running:
        client = WebsocketClientPolicy(running.url)
        first, second = (client.infer(given) for _ in range(2))
        assert first["actions"].shape == (8, 7)
        assert first["seed"] != second["seed"]  # noise of its own for each request that does not ask for some
        assert np.abs(first["actions"] - second["actions"]).max() > 1e-3
        again = client.infer(given | {"seed": first["seed"]})
        np.testing.assert_allclose(again["actions"], first["actions"], atol=1e-6)


def test_health_metrics_and_nothing_else_over_http(server, policy):
    assert server.get("/healthz") == "OK\n"
    before = server.metric("kairos_policy_requests_total")
    with PolicyClient(server.url) as client:
        client.infer(observation(0))
        with pytest.raises(PolicyError):
            client.infer({})
        client.reset()
    assert server.metric("kairos_policy_requests_total") == before + 1
    assert server.metric('kairos_policy_errors_total{kind="observation"}') >= 1
    assert server.metric("kairos_policy_resets_total") >= 1
    assert server.metric("kairos_policy_latency_seconds_count") >= before + 3
    assert server.metric("kairos_policy_batch_size_count") >= 1
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.get("/")


def test_the_handshake_offers_no_compression_and_refuses_browsers(server):
    with connect(server.url) as websocket:  # offers compression
        assert websocket.protocol.extensions == []
    with pytest.raises(InvalidStatus, match="403"):
        connect(server.url, origin="https://somewhere.example")


def test_a_reset_clears_the_history_of_its_connection_alone(tmp_path):
    served = ServedPolicy(write_export(tmp_path / "two", config_of(history_frames=2, frames=9)), steps=1)
    with in_thread(served) as running, PolicyClient(running.url) as one, PolicyClient(running.url) as other:
        fresh = one.infer(observation(0))["actions"]
        for client in (one, other):
            client.infer(observation(1))
        remembered = one.infer(observation(0))["actions"]
        assert np.abs(remembered - fresh).max() > 1e-3
        one.reset()
        np.testing.assert_allclose(one.infer(observation(0))["actions"], fresh, atol=1e-6)
        assert np.abs(other.infer(observation(0))["actions"] - fresh).max() > 1e-3


# --- strangers ---


def hostile_messages() -> st.SearchStrategy[bytes | str]:
    whole = observation(0)
    packed = encode(whole)
    fields = st.sampled_from([*whole, "endpoint", "observation/image"])
    arrays = st.builds(
        lambda dtype, shape, data: array() | {b"dtype": dtype, b"shape": shape, b"data": data},
        st.sampled_from(["|u1", "<f4", ">f8", "|O", "|V4", "<c8", "<U4", "|S9", "<M8[ns]", "|b1", "f4,O", "<f4x"]),
        st.lists(st.sampled_from([0, 1, 2, 3, 32, 2**31 - 1, 2**62, -1]), max_size=5),
        st.binary(max_size=96),
    )
    wrong_field = st.builds(
        lambda key, value: msgpack.packb(msgpack.unpackb(packed) | {key: value}), fields, arrays | JUNK
    )
    return st.one_of(
        st.binary(max_size=300),
        st.text(max_size=30),
        st.integers(0, len(packed) - 1).map(lambda end: packed[:end]),
        st.tuples(st.integers(0, len(packed) - 1), st.integers(0, 255)).map(
            lambda change: packed[: change[0]] + bytes([change[1]]) + packed[change[0] + 1 :]
        ),
        st.integers(1, 3000).map(nested),
        JUNK.map(msgpack.packb),
        wrong_field,
        st.lists(fields, unique=True).map(lambda keys: encode({k: v for k, v in whole.items() if k not in keys})),
        st.integers(MESSAGE_CAP - 2, MESSAGE_CAP + 2).map(bytes),
    )


def test_hostile_messages_hurt_nobody_else(server, policy):
    """Every message is answered by a text or a reply, or (too long) ends its connection; a good client is served."""
    wanted = expected(policy, 1)
    stranger = open_socket(server)
    good = PolicyClient(server.url)

    @settings(max_examples=100, deadline=None)
    @given(hostile_messages())
    def fuzz(message):
        nonlocal stranger
        if len(message) > MESSAGE_CAP:
            with pytest.raises(ConnectionClosed):
                ask(stranger, message)
            stranger = open_socket(server)
        else:
            reply = ask(stranger, message)
            assert isinstance(reply, str) or decode(reply).keys() <= {"actions", "seed", "server_timing", "endpoint"}
        np.testing.assert_allclose(good.infer(observation(1))["actions"], wanted, atol=1e-5)

    fuzz()
    stranger.close()
    good.close()


def test_a_pickle_is_refused_and_not_opened(server, tmp_path):
    marker = tmp_path / "ran"
    pickled = pickle.dumps(Payload(marker))
    hostile = array() | {b"dtype": "|O", b"shape": [1], b"data": pickled}
    with open_socket(server) as stranger:
        for message in (pickled, msgpack.packb(msgpack.unpackb(encode(observation(0))) | {CAMERA: hostile})):
            assert isinstance(ask(stranger, message), str)
        assert isinstance(ask(stranger, encode(observation(0))), bytes)  # the connection goes on
    assert not marker.exists()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hello", "message: is a text frame"),
        (b"\xc1", "message: is not readable msgpack"),
        (encode([1]), "message: is a list"),
        (encode({"endpoint": "shutdown"}), "'endpoint': a message with it must be"),
        (encode({"endpoint": np.zeros(3)}), "'endpoint': a message with it must be"),
        (encode({"endpoint": "reset", "more": 1}), "'endpoint': a message with it must be"),
        (encode(observation(0) | {STATE: np.zeros(3)}), f"'{STATE}': has shape [3]; send (2,)"),
    ],
)
def test_an_unfit_message_is_answered_with_a_text(server, message, reason):
    with open_socket(server) as websocket:
        reply = ask(websocket, message)
        assert isinstance(reply, str)
        assert reason in reply


def test_broken_connections_hurt_nobody_else(server, policy):
    before = server.metric("kairos_policy_connections")
    for raw in (b"\x00\x01\x02", b"POST / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n", b"A" * 20_000):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", server.port)) as garbage:
            garbage.sendall(raw)
    for _ in range(3):  # goes away in the middle of a message, and with a request on its way
        websocket = open_socket(server)
        websocket.socket.sendall(b"\x82\xfe\x10\x00")
        websocket.socket.shutdown(socket.SHUT_RDWR)
        websocket = open_socket(server)
        websocket.send(encode(observation(0)))
        websocket.socket.shutdown(socket.SHUT_RDWR)
    with PolicyClient(server.url) as client:
        np.testing.assert_allclose(client.infer(observation(2))["actions"], expected(policy, 2), atol=1e-5)
        wait_until(lambda: server.metric("kairos_policy_connections") <= before + 1)


def test_a_connection_too_many_is_sent_away(policy):
    with in_thread(policy, max_connections=1) as running, PolicyClient(running.url) as client:
        client.infer(observation(0))
        with pytest.raises(ConnectionClosed) as closed:
            open_socket(running)
        assert closed.value.rcvd.code == 1013
        client.infer(observation(0))
        assert running.metric('kairos_policy_errors_total{kind="connections"}') == 1


def test_a_request_that_fails_in_the_model_fails_alone(exported):
    policy = ServedPolicy(exported, steps=20)
    encoder = policy._predictor.encoders.text
    encode_text = encoder.encode

    def refuses_one(prompts, images=None):
        if any("special token" in prompt for prompt in prompts):
            raise IndexError("position 7 of 6")
        return encode_text(prompts, images)

    encoder.encode = refuses_one  # as a tokeniser may break on its own special tokens in a prompt
    with in_thread(policy, batch_window=1.0, max_batch=4) as running:
        clients = [PolicyClient(running.url) for _ in range(4)]
        for client in clients:
            client.reset()
            assert client.metadata
        prompts = ["push", "special token", "push", "push"]
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            asked = [
                threads.submit(client.infer, observation(0) | {"prompt": prompt})
                for client, prompt in zip(clients, prompts)
            ]
        assert [future.exception() is None for future in asked] == [True, False, True, True]
        assert str(asked[1].exception()).startswith("internal error")
        assert "position 7" not in str(asked[1].exception())
        assert running.metric('kairos_policy_errors_total{kind="internal"}') == 1
        clients[1].infer(observation(0))  # its connection goes on
        for client in clients:
            client.close()


# --- tokens ---


def test_a_token_is_asked_for(policy):
    with in_thread(policy, token="s3cret") as running:
        assert running.get("/healthz") == "OK\n"
        for headers in (
            {},
            {"Authorization": "Bearer s3cre"},
            {"Authorization": "s3cret"},
            {"Authorization": "Bearer ü"},
        ):
            with pytest.raises(InvalidStatus, match="401"):
                connect(running.url, additional_headers=headers)
        twice = [("Authorization", "Bearer s3cret"), ("Authorization", "Bearer other")]
        with pytest.raises(InvalidStatus, match="401"):
            connect(running.url, additional_headers=twice)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            running.get("/metrics")
        with pytest.raises(UserError, match="refuses the token"):
            PolicyClient(running.url, token="wrong").infer(observation(0))
        with PolicyClient(running.url, token="s3cret") as client:
            client.infer(observation(0))
        WebsocketClientPolicy(running.url, api_key="s3cret").infer(observation(0))
        right = {"Authorization": "Bearer s3cret"}
        assert running.metric('kairos_policy_errors_total{kind="token"}', **right) == 7


# --- batches ---


def test_waiting_requests_are_computed_together_with_the_same_actions(policy):
    count = 8
    with in_thread(policy, batch_window=60.0, max_batch=count) as running:
        clients = [PolicyClient(running.url) for _ in range(count)]
        for client in clients:
            assert client.metadata  # all are connected: the batch waits for all of them, and no longer
        with concurrent.futures.ThreadPoolExecutor(count) as threads:
            replies = list(threads.map(lambda pair: pair[1].infer(observation(pair[0])), enumerate(clients)))
        for seed, reply in enumerate(replies):
            np.testing.assert_allclose(reply["actions"], expected(policy, seed), atol=1e-5)
        assert running.metric("kairos_policy_batch_size_count") == 1
        assert running.metric("kairos_policy_batch_size_sum") == count
        for client in clients:
            client.close()


def test_a_batch_is_never_larger_than_allowed(slow):
    clients = [PolicyClient(slow.url, timeout=120) for _ in range(9)]
    assert all(client.metadata for client in clients)  # connected
    with concurrent.futures.ThreadPoolExecutor(9) as threads:
        list(threads.map(lambda client: client.infer(observation(0)), clients))
    for client in clients:
        client.close()
    four, all_of_them = (slow.metric(f'kairos_policy_batch_size_bucket{{le="{size}"}}') for size in ("4.0", "+Inf"))
    assert four == all_of_them


def test_actions_that_are_not_finite_reach_no_robot(policy):
    def breaks_one(windows):
        actions = policy.act(windows)
        actions[0, 3, 1] = np.nan
        return actions

    async def ask_two() -> list:
        batcher = Batcher(breaks_one, max_batch=2, window=0.0, clients=lambda: 2, metrics=Metrics())
        answers = [batcher.submit(policy.history(), policy.reader.read(observation(seed))) for seed in range(2)]
        running = asyncio.create_task(batcher.run())
        results = await asyncio.gather(*answers, return_exceptions=True)
        running.cancel()
        return results

    broken, sound = asyncio.run(ask_two())
    assert isinstance(broken, FloatingPointError)
    np.testing.assert_allclose(sound.actions, expected(policy, 1), atol=1e-5)


def test_pings_are_answered_while_the_model_computes(exported):
    policy = Gated(exported, steps=1)
    with in_thread(policy) as running, open_socket(running) as websocket:
        before = accepted(running)
        websocket.send(encode(observation(0)))
        wait_until(lambda: accepted(running) > before)
        for _ in range(3):  # none would come back if the model held the loop
            assert websocket.ping().wait(timeout=60)
        with pytest.raises(TimeoutError):
            websocket.recv(timeout=0)  # the reply is not there yet
        policy.gate.set()
        assert isinstance(websocket.recv(timeout=120), bytes)
