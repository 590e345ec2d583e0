"""Episodes of a served policy in the pushing simulator: what the server is asked, and the whole command."""

import json
import socket
import subprocess
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.serving_exports import config_of, write_export
from support.serving_server import in_thread

from dataloaders.simulators.base import TASKS
from dataloaders.simulators.collect import simulate
from dataloaders.simulators.make import make
from evaluation.closed_loop import policies, run, server
from evaluation.closed_loop.episode import Episode, noise_seed
from evaluation.closed_loop.episodes import play
from evaluation.closed_loop.run import PolicySource, Protocol, closed_loop
from evaluation.closed_loop.workers import Setup
from evaluation.intervals import wilson
from kairos_train.basics.errors import RunStopped, UserError
from kairos_train.cli import main
from kairos_train.serving.client import PolicyClient
from kairos_train.serving.observation import Observation
from kairos_train.serving.policy import ServedPolicy

SIZES = {"action_dim": 2, "state_dim": 2}


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    """A random model of the pushing task's sizes; read only."""
    return write_export(tmp_path_factory.mktemp("export") / "push", config_of(**SIZES))


@pytest.fixture(scope="module")
def policy(export) -> ServedPolicy:
    return ServedPolicy(export, steps=1)


def keys_of(served: ServedPolicy, replan_every: int = 4) -> policies.ServedKeys:
    return policies.served_keys(served.metadata, make("push2d", None, 32), replan_every=replan_every)


def plans_of(client: PolicyClient, keys: policies.ServedKeys, which: Episode, count: int) -> list[np.ndarray]:
    """The first plans of an episode, nothing of them executed but what is common to all."""
    player = policies.RemotePolicy(client, keys, wrong=which.policy == "wrong")
    simulator = make(which.env, which.task, 32)
    first = simulator.reset(which.seed)
    player.begin(simulator, which, first)
    return [player.plan([first]) for _ in range(count)]


# --- what the server is asked ---


def test_plans_are_of_the_episode_and_differ_by_replan_and_instruction(policy):
    red = Episode("model", "push2d", "push-red", 10_000)
    keys = keys_of(policy)
    with in_thread(policy) as running, PolicyClient(running.url) as client:
        plans = plans_of(client, keys, red, 2)
        again = plans_of(client, keys, red, 2)
        wrong = plans_of(client, keys, Episode("wrong", "push2d", "push-red", 10_000), 1)
        blue = plans_of(client, keys, Episode("model", "push2d", "push-blue", 10_000), 1)
    assert plans[0].shape == (8, 2)
    np.testing.assert_allclose(plans, again, atol=1e-6)
    assert np.abs(plans[0] - plans[1]).max() > 1e-2  # the same scene, another noise
    assert np.abs(plans[0] - wrong[0]).max() > 1e-3  # the same noise, another instruction
    assert np.abs(blue[0] - wrong[0]).max() > 1e-2  # the same instruction, another noise


def test_the_plan_is_the_served_models_of_scene_instruction_and_noise(policy):
    which = Episode("wrong", "push2d", "push-red", 10_003)
    first = make("push2d", "push-red", 32).reset(10_003)
    prompt = TASKS["push2d"]["push-blue"]
    asked = Observation((first.frame[None],), first.state[None], prompt, noise_seed(which, 0))
    with in_thread(policy) as running, PolicyClient(running.url) as client:
        (plan,) = plans_of(client, keys_of(policy), which, 1)
    np.testing.assert_allclose(plan, policy.act([policy.history().window(asked)])[0], atol=1e-5)


def test_a_model_with_a_history_is_shown_every_frame_of_it_and_forgets_the_episode_before(tmp_path):
    served = ServedPolicy(write_export(tmp_path / "two", config_of(**SIZES, history_frames=2, frames=9)), steps=1)
    keys, simulator = keys_of(served), make("push2d", "push-red", 32)
    assert (keys.given_frames, keys.looks_every) == (5, 2)
    with in_thread(served) as running, PolicyClient(running.url) as client:
        player = policies.RemotePolicy(client, keys)
        for seed in (10_000, 10_001):
            which, history = Episode("model", "push2d", "push-red", seed), served.history()
            game = play(simulator, player, which, replan_every=4)
            twin = make("push2d", "push-red", 32)
            seen, wanted = [twin.reset(seed)], next(game)
            for replan in range(4):
                plan = wanted()
                frames, states = (np.stack([getattr(one, name) for one in seen]) for name in ("frame", "state"))
                asked = Observation((frames,), states, twin.instruction, noise_seed(which, replan))
                np.testing.assert_allclose(plan, served.act([history.window(asked)])[0], atol=1e-5)
                seen = []
                for number, action in enumerate(plan[:4]):
                    now, _ = twin.step(action)
                    seen += [now] if number % 2 else []
                wanted = game.send(plan)
            game.close()


# --- what does not fit ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cameras": ["observation.images.wrist"]}, r"cameras \['observation.images.wrist'\], the simulator has"),
        ({"action_dim": 7}, "action_dim 7, the simulator has 2"),
        ({"state_dim": 4}, "state_dim 4, the simulator has 2"),
        ({"fps": 80.0}, "fps 80.0, the simulator has 20.0"),
        ({"horizon": 3}, "replan_every=4: the policy plans 3 actions at a time"),
        ({"given_frames": 5, "action_video_freq_ratio": 3}, "replan_every=4: the policy looks at 5 frames, 3 actions"),
        ({"observation_keys": {"dataset": ["observation.images.top", "a", "b", "prompt"]}}, r"2 parts \(a, b\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_policy_of_another_robot_is_refused(policy, change, message):
    with pytest.raises(UserError, match=message):
        policies.served_keys({**policy.metadata, **change}, make("push2d", None, 32), replan_every=4)


def test_a_server_of_another_policy_is_refused(policy, tmp_path):
    other = write_export(tmp_path / "other", config_of(**SIZES, frames=9))
    with in_thread(policy) as running, pytest.raises(UserError, match="serves another policy than"):
        closed_loop(
            Protocol("push2d", policies=["model"]), PolicySource(other, url=running.url), demos=None, out=tmp_path
        )


def test_no_server_is_one_line_and_a_lost_one_stops_the_evaluation(monkeypatch, tmp_path):
    monkeypatch.setattr(server, "GREET_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(UserError, match="no policy server"):
        closed_loop(Protocol("push2d", policies=["model"]), PolicySource(url=url), demos=None, out=tmp_path)
    with pytest.raises(RunStopped, match="the policy server went away"):
        run._still_there(Setup(size=32, replan_every=4, concurrent=1, url=url))


def test_an_export_that_cannot_be_served_is_one_line_and_leaves_no_process(export, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in export.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "sampler.json").unlink()
    words = ["closed-loop", str(broken), "--env", "push2d", "--policies", "model", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "cannot be served: kairos-train: error:" in said
    assert "sampler.json: not found" in said
    assert said.count("\n") == 1
    assert "broken" not in processes()


# --- the whole ---


def test_episodes_are_played_through_a_running_server(policy, tmp_path):
    settings = {"policies": ("wrong", "model"), "processes": 1, "concurrent": 3, "size": 32, "replan_every": 8}
    protocol = Protocol("push2d", tasks=["push-red"], episodes=2, **settings)
    with in_thread(policy) as running:
        result = closed_loop(protocol, PolicySource(url=running.url), demos=None, out=tmp_path)
        requests, resets = (running.metric(f"kairos_policy_{name}_total") for name in ("requests", "resets"))
    episodes = [e for found in result["policies"].values() for e in found["episodes"]]
    assert [e["error"] for e in episodes] == [None] * 4
    assert requests == sum(ceil(e["steps"] / 8) for e in episodes)
    assert resets == 4 - 3  # the first of each connection has nothing to forget
    assert result["export"]["server"] == running.url
    assert result["export"]["model"] == policy.metadata["model"]


def test_the_command_serves_the_export_judges_it_and_ends_the_server(export, tmp_path, capsys):
    simulate(env="push2d", tasks=[], episodes_per_task=1, out=tmp_path / "demos", size=32, processes=1)
    words = ["closed-loop", str(export), "--env", "push2d", "--tasks", "push-blue", "--episodes", "2"]
    words += ["--policies", "model,random,hold,replay,expert,wrong", "--demos", str(tmp_path / "demos")]
    words += ["--steps", "1", "--device", "cpu", "--processes", "1", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    printed, said = capsys.readouterr()
    result = json.loads((tmp_path / "out/closed_loop.json").read_text())
    assert list(result) == [
        *("env", "policies", "seed_start", "episodes_per_task", "replan_every", "max_steps", "export"),
    ]
    assert [result[key] for key in list(result)[2:6]] == [10_000, 2, 4, 120]
    assert list(result["policies"]) == ["model", "random", "hold", "replay", "expert", "wrong"]
    for name, found in result["policies"].items():
        assert list(found) == ["tasks", "all", "episodes"]
        assert [list(e) for e in found["episodes"]] == [["task", "seed", "success", "steps", "error"]] * 2
        assert [(e["task"], e["seed"], e["error"]) for e in found["episodes"]] == [
            ("push-blue", 10_000, None),
            ("push-blue", 10_001, None),
        ]
        counts = found["tasks"]["push-blue"]
        assert counts == found["all"]
        assert counts["interval95"] == list(wilson(counts["successes"], 2))
        assert name in said
    assert result["policies"]["expert"]["all"]["successes"] == 2
    assert result["export"]["path"] == str(export)
    assert json.loads(printed)["policies"]["expert"]["all"]["rate"] == 1.0
    with Image.open(tmp_path / "out/closed_loop.png") as chart:
        assert len(chart.convert("L").getcolors()) > 20
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("closed_loop.json", "closed_loop.png", "report.html", "server.log"),
    ]
    assert "push-blue" in (tmp_path / "out/report.html").read_text()
    assert str(export) not in processes()


def processes() -> str:
    """Command lines of all policy servers that run."""
    lines = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return "\n".join(line for line in lines if " serve " in line)
