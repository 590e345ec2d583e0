"""RoboTwin through the real policy server, its results, and replanning. The simulator is stood in for."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from support.serving_server import in_thread
from support.watched_policy import Watched, served

from evaluation.benchmarks import robotwin_policy
from evaluation.benchmarks.replanning import Replanner
from evaluation.benchmarks.robotwin import CONFIGS, TASKS, check_robotwin, import_robotwin, write_policy
from evaluation.intervals import wilson
from kairos_train.basics.errors import UserError
from kairos_train.cli import main

# --- several frames ---


class Chunks:
    """A policy's interface: chunks of six actions that count up; given five frames, two actions apart."""

    metadata = {"horizon": 6, "given_frames": 5, "action_video_freq_ratio": 2}  # noqa: RUF012

    def __init__(self):
        self.sent, self.resets = [], 0

    def reset(self):
        self.resets += 1

    def infer(self, observation):
        self.sent.append(observation)
        return {"actions": np.arange(6, dtype=np.float32)[:, None] + 10 * len(self.sent)}


def test_a_policy_of_several_frames_gets_those_since_the_last_request():
    policy = Chunks()
    stream = Replanner(policy, replan_steps=4)
    stream.begin("first")
    actions = [stream.act({"state": np.array([step])}, "go")[0] for step in range(9)]
    assert actions == [10, 11, 12, 13, 20, 21, 22, 23, 30]
    assert [request["state"][:, 0].tolist() for request in policy.sent] == [[0], [2, 4], [6, 8]]
    stream.begin("second")
    stream.act({"state": np.array([99])}, "go")
    assert policy.sent[-1]["state"][:, 0].tolist() == [99]
    assert policy.resets == 2
    assert len({request["seed"] for request in policy.sent}) == 4
    with pytest.raises(ValueError, match="was begun before"):
        stream.begin("first")


@pytest.mark.parametrize(("steps", "message"), [(7, "1 to 6 actions"), (0, "1 to 6"), (3, "a multiple of 2")])
def test_steps_that_do_not_fit_the_policy_are_refused(steps, message):
    with pytest.raises(UserError, match=message):
        Replanner(Chunks(), replan_steps=steps)


# --- RoboTwin ---


@pytest.fixture(scope="module")
def robotwin_server(tmp_path_factory):
    cameras = [f"observation.images.{name}" for name in ("cam_high", "cam_left_wrist", "cam_right_wrist")]
    policy = served(tmp_path_factory.mktemp("robotwin") / "model", action_dim=14, state_dim=14, cameras=cameras)
    with in_thread(policy) as running:
        yield running


class Task:
    """Stands in for RoboTwin's TASK_ENV; driven as script/eval_policy.py drives it."""

    step_lim = 5

    def __init__(self):
        self.take_action_cnt, self.eval_success, self.taken = 0, False, []

    def get_instruction(self):
        return "lift the pot"

    def get_obs(self):
        cameras = {"head_camera": 1, "left_camera": 2, "right_camera": 3}
        pictures = {name: {"rgb": np.full((24, 32, 3), shade, np.uint8)} for name, shade in cameras.items()}
        return {"observation": pictures, "joint_action": {"vector": np.full(14, self.take_action_cnt, np.float64)}}

    def take_action(self, action, action_type="qpos"):
        self.taken.append((action, action_type))
        self.take_action_cnt += 1
        self.eval_success = self.take_action_cnt == 4


def settings_of(url, **changed):
    told = {"policy_url": url, "task_name": "lift_pot", "task_config": "demo_clean", "ckpt_setting": "a", "seed": 0}
    return told | {"left_arm_dim": 6, "right_arm_dim": 6, "replan_steps": "2", "cameras": "null"} | changed


def episode(model):
    """What the script does with the three functions in one episode."""
    task = Task()
    robotwin_policy.reset_model(model)
    while task.take_action_cnt < task.step_lim and not task.eval_success:
        robotwin_policy.eval(task, model, task.get_obs())
    return task.taken


def test_robotwins_script_drives_the_three_functions(robotwin_server):
    with Watched(robotwin_server.url) as policy:
        model = robotwin_policy.Robotwin(policy, settings_of(robotwin_server.url))
        for _ in range(2):
            assert [(action.shape, kind) for action, kind in episode(model)] == [((14,), "qpos")] * 4
    assert len(policy.sent) == 4 == len({request["seed"] for request in policy.sent})
    second = policy.sent[1]
    assert second["observation.state"].tolist() == [2.0] * 14
    names = ("cam_high", "cam_left_wrist", "cam_right_wrist")
    assert [int(second[f"observation.images.{name}"][0, 0, 0]) for name in names] == [1, 2, 3]
    assert second["prompt"] == "lift the pot"


def test_a_run_of_the_script_is_the_same_again_and_another_seed_is_another(robotwin_server):
    def actions(seed):
        model = robotwin_policy.get_model(settings_of(robotwin_server.url, seed=seed))
        return [np.stack([action for action, _ in episode(model)]) for _ in range(2)]

    first, again, other = actions(0), actions(0), actions(1)
    np.testing.assert_allclose(first, again, atol=1e-5)
    assert not np.allclose(first[0], first[1], atol=1e-3)
    assert not np.allclose(first[0], other[0], atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"left_arm_dim": 7, "right_arm_dim": 7}, "robot: 16 dimensions"),
        ({"cameras": "observation.images.cam_high=left_camera"}, "takes one twice"),
        ({"cameras": "observation.images.nose=left_camera"}, "observation.images.nose' is not matched"),
        ({"policy_url": "null"}, "policy_url: is missing"),
    ],
    ids=["arms", "twice", "unknown", "url"],
)
def test_a_robot_or_camera_that_does_not_fit_is_refused(robotwin_server, changed, message):
    with pytest.raises(UserError, match=message):
        robotwin_policy.get_model(settings_of(robotwin_server.url, **changed))


def test_a_policys_folder_is_what_the_script_imports(tmp_path, monkeypatch):
    out = tmp_path / "policy/kairos"
    write_policy(out, url="ws://10.0.0.1:8000", setting="v1.2", seed=3, replan_steps=8)
    told = yaml.safe_load((out / "deploy_policy.yml").read_text())
    assert (told["policy_url"], told["ckpt_setting"], told["seed"], told["replan_steps"]) == (
        *("ws://10.0.0.1:8000", "v1.2", 3, 8),
    )
    assert told["cameras"] is None
    monkeypatch.syspath_prepend(tmp_path / "policy")
    module = importlib.import_module("kairos")
    assert all(callable(getattr(module, name)) for name in ("get_model", "eval", "reset_model"))
    sys.modules.pop("kairos")
    script = (out / "evaluate.sh").read_text()
    assert subprocess.run(["bash", "-n", str(out / "evaluate.sh")]).returncode == 0
    assert all(f" {task}" in script for task in TASKS)
    assert "--seed 3 --policy_name kairos" in script
    with pytest.raises(UserError, match="the script imports 'my-policy'"):
        write_policy(tmp_path / "my-policy", url="ws://x:1", setting="a")


# --- RoboTwin's results ---


def results_tree(folder, rate=0.5):
    """As script/eval_policy.py leaves it."""
    for config in CONFIGS:
        for task in TASKS:
            result_file(folder, task, config, rate)
    return folder


def result_file(folder, task, config, rate, time="2026-01-01 10:00:00"):
    path = folder / task / "kairos" / config / "v1" / time / "_result.txt"
    path.parent.mkdir(parents=True)
    path.write_text(f"Timestamp: {time}\n\nInstruction Type: unseen\n\n{rate}")
    return path


NAMED = {"policy": "kairos", "setting": "v1"}


def test_robotwin_is_told_by_task_and_configuration(tmp_path):
    tree = results_tree(tmp_path / "eval_result")
    path = next(tree.glob("lift_pot/kairos/demo_randomized/*/*/_result.txt"))
    path.write_text(path.read_text().replace("0.5", "0.07"))
    content = import_robotwin(tree, **NAMED, out=tmp_path / "o.json")
    clean, randomized = content["scores"]["demo_clean"], content["scores"]["demo_randomized"]
    assert (clean["total"]["successes"], clean["total"]["n"]) == (2500, 5000)
    assert (clean["total"]["low"], clean["total"]["high"]) == wilson(2500, 5000)
    assert (randomized["lift_pot"]["successes"], randomized["lift_pot"]["n"]) == (7, 100)
    assert randomized["total"]["successes"] == 2457
    assert len(clean) == 51


def test_robotwins_missing_and_doubled_results_are_named_and_not_pooled(tmp_path, capsys):
    tree = results_tree(tmp_path / "eval_result")
    next(tree.glob("stamp_seal/kairos/demo_clean/*/*/_result.txt")).unlink()
    result_file(tree, "lift_pot", "demo_clean", 0.9, "2026-01-02 10:00:00")
    named = ["--policy", "kairos", "--setting", "v1"]
    assert main(["benchmark", "check", "robotwin", str(tree), *named]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["missing"] == ["demo_clean/stamp_seal"]
    assert list(report["several"]) == ["demo_clean/lift_pot"]
    with pytest.raises(UserError, match=r"1 are missing \(demo_clean/stamp_seal\) and 1 there several times"):
        import_robotwin(tree, **NAMED, out=tmp_path / "o.json")
    assert check_robotwin(tree, **NAMED, configs=["demo_randomized"])["complete"]


@pytest.mark.parametrize("text", ["0.505", "1.2", "nan", "", "done"])
def test_a_file_without_a_rate_of_a_hundred_episodes_is_refused(tmp_path, text):
    tree = results_tree(tmp_path / "eval_result")
    next(tree.glob("lift_pot/kairos/demo_clean/*/*/_result.txt")).write_text(text)
    with pytest.raises(UserError, match="ends with no rate of 100 episodes"):
        import_robotwin(tree, **NAMED, out=tmp_path / "o.json")


# --- in the simulators' environments ---


def test_the_simulators_side_needs_no_torch():
    code = (
        "import sys, evaluation.benchmarks.libero_client, evaluation.benchmarks.robotwin_policy\n"
        "import kairos_train.serving.client\n"
        "print({'torch', 'av', 'PIL', 'hydra', 'prometheus_client', 'libero'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "set()"
