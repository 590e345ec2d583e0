"""The policy server's client, and `kairos-train serve` as a process."""

import signal
import socket
import sys

import numpy as np
import pytest
from support.serving_exports import config_of, write_export
from support.serving_server import CAMERA, accepted, in_process, in_thread, observation, open_socket, wait_until
from websockets.exceptions import ConnectionClosed

from kairos_train.basics.errors import UserError
from kairos_train.cli import main
from kairos_train.serving.client import PolicyClient, PolicyLost
from kairos_train.serving.codec import decode, encode
from kairos_train.serving.policy import ActionClipping, ServedPolicy
from kairos_train.serving.run import is_local, read_token

SLOW_STEPS = 100  # some tenths of a second for the tiny model


@pytest.fixture(scope="module")
def policy(exported) -> ServedPolicy:
    return ServedPolicy(exported, steps=1)


# --- the client ---


def test_a_client_connects_again_when_its_server_was_restarted(policy):
    with in_thread(policy) as running:
        client = PolicyClient(running.url, connect_timeout=0.3)
        wanted = client.infer(observation(0))["actions"]
    with pytest.raises(PolicyLost, match="no policy server in"):
        client.infer(observation(0))
    with in_thread(policy) as again:
        client = PolicyClient(again.url)
        client.infer(observation(0))
        client._connected().socket.shutdown(socket.SHUT_RDWR)
        np.testing.assert_allclose(client.infer(observation(0))["actions"], wanted, atol=1e-6)
        client.close()


def test_a_client_does_not_go_on_without_its_history(tmp_path):
    served = ServedPolicy(write_export(tmp_path / "two", config_of(history_frames=2, frames=9)), steps=1)
    with in_thread(served) as running, PolicyClient(running.url) as client:
        client.infer(observation(0))
        client._connected().socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(PolicyLost, match="begin the episode again"):
            client.infer(observation(1))
        client.infer(observation(0))


def test_a_late_reply_is_not_taken_for_the_next(exported):
    with in_thread(ServedPolicy(exported, steps=SLOW_STEPS)) as slow, PolicyClient(slow.url, timeout=1e-3) as client:
        with pytest.raises(PolicyLost, match=r"no reply in 0.001 s"):
            client.infer(observation(0))
        client.timeout = 120
        assert client.infer(observation(5))["seed"] == 5


def test_a_message_over_the_cap_is_not_sent_again(policy):
    with in_thread(policy, max_message_bytes=2**18) as server, PolicyClient(server.url) as client:
        with pytest.raises(PolicyLost):
            client.infer(observation(0) | {CAMERA: np.zeros((600, 600, 3), np.uint8)})
        client.infer(observation(0))
        assert 1 <= server.metric('kairos_policy_errors_total{kind="size"}') <= 2


def test_what_is_clipped_is_counted(exported):
    served = ServedPolicy(exported, steps=1, clipping=ActionClipping("minmax", -0.4))
    served.warm_up(1)  # what nobody asked for does not count
    before = served.clipped
    with in_thread(served) as server, PolicyClient(server.url) as client:
        assert server.metric("kairos_policy_clipped_action_values_total") == 0
        client.infer(observation(0))
        assert server.metric("kairos_policy_clipped_action_values_total") == served.clipped - before > 0


# --- the command ---


def test_shutdown_answers_what_was_accepted(exported):
    count = 3
    with in_process(exported, "--steps", str(SLOW_STEPS), "--max-batch", "2") as (process, running):
        websockets = [open_socket(running) for _ in range(count + 1)]
        for seed, websocket in enumerate(websockets[:count]):
            websocket.send(encode(observation(seed)))
        wait_until(lambda: accepted(running) == count)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed) as idle:
            websockets[-1].recv(timeout=120)
        assert idle.value.rcvd.code == 1001
        for seed, websocket in enumerate(websockets[:count]):
            assert decode(websocket.recv(timeout=120))["seed"] == seed
            with pytest.raises(ConnectionClosed) as closed:
                websocket.recv(timeout=120)
            assert closed.value.rcvd.code == 1001
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--port", "65536"], "port=65536: must be from 0 to 65535"),
        (["--max-message-mb", "0"], "max-message-mb=0.0: must be above 0"),
        (["--batch-window-ms", "-1"], "batch-window-ms=-1.0: must be from 0 to 1000"),
        (["--fps", "0"], "fps=0.0: must be above 0"),
        (["--clip-margin", "0.1"], "clip-margin=0.1: widens the range of --clip-actions, which is not given"),
        (["--clip-actions", "minmax", "--clip-margin", "-1"], "clip-margin=-1.0: must be 0 or more"),
        (["--token-file", "nowhere"], "token-file=nowhere: cannot be read"),
        (["--token-file", "/dev/null"], "must hold one word of printable ASCII"),
        (["--cameras", "front"], "cameras=front"),
    ],
)
def test_a_wrong_option_is_one_line(exported, capsys, options, reason):
    assert main(["serve", str(exported), *options]) == 2
    assert reason in capsys.readouterr().err


def test_a_token_is_the_word_in_its_file(tmp_path):
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("  s3cret\n")
    assert read_token(tmp_path / "token") == "s3cret"
    for wrong in ("", "two words", "grüß", "a\nb"):
        (tmp_path / "token").write_text(wrong)
        with pytest.raises(UserError, match="must hold one word"):
            read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("robot.lab", False)],
)
def test_an_address_that_others_reach_is_known(host, local):
    assert is_local(host) == local


def test_a_missing_package_is_one_line(exported, monkeypatch, capsys):
    for module in ("run", "server"):
        monkeypatch.delitem(sys.modules, f"kairos_train.serving.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "websockets.asyncio.server", None)  # as if it were not installed
    assert main(["serve", str(exported)]) == 2
    assert "websockets is not installed; run `pip install 'kairos-train[serve]'`" in capsys.readouterr().err


def test_an_address_in_use_is_one_line(exported, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(exported), "--port", str(port), "--max-batch", "1", "--steps", "1"]) == 2
    assert f"port={port}: cannot listen there" in capsys.readouterr().err
