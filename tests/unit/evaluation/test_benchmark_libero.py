"""LIBERO through the real policy server, and its results. The simulator, which is not ours, is stood in for."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from support.serving_server import in_thread
from support.watched_policy import Watched, served

from evaluation.benchmarks import libero_client
from evaluation.benchmarks.libero import check_libero, import_libero
from evaluation.benchmarks.libero_client import NO_OP, header_of, run_suite
from evaluation.benchmarks.replanning import Replanner
from evaluation.intervals import wilson
from kairos_train.basics.errors import UserError
from kairos_train.cli import main


@pytest.fixture(scope="module")
def libero_server(tmp_path_factory):
    cameras = ["observation.images.image", "observation.images.wrist_image"]
    policy = served(tmp_path_factory.mktemp("libero") / "model", action_dim=7, state_dim=8, cameras=cameras)
    with in_thread(policy) as running:
        yield running


@pytest.fixture
def libero_policy(libero_server):
    with Watched(libero_server.url) as policy:
        yield policy


class Simulator:
    """Stands in for LIBERO's OffScreenRenderEnv: solved by `solved_at` steps of the policy, broken at `broken_at`."""

    def __init__(self, log, solved_at, broken_at=None):
        self.log, self.solved_at, self.broken_at = log, solved_at, broken_at

    def reset(self):
        self.steps = 0

    def set_init_state(self, state):
        self.log.append(("state", float(state[0])))
        return self.raw()

    def raw(self):
        picture = np.zeros((256, 256, 3), np.uint8)
        picture[0, 0] = (self.steps + 1, 2, 3)
        return {
            "agentview_image": picture,
            "robot0_eye_in_hand_image": picture[:, ::-1],
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([0.0, 0.0, np.sin(0.25), np.cos(0.25)]),  # 0.5 about z
            "robot0_gripper_qpos": np.array([0.01, -0.01]),
        }

    def step(self, action):
        self.steps += 1
        if self.broken_at is not None and self.steps > self.broken_at:
            raise RuntimeError("the simulator broke")
        self.log.append(("action", action))
        return self.raw(), 0.0, self.steps == 10 + self.solved_at, {}

    def close(self):
        self.log.append(("closed", None))


class Suite:
    """Stands in for a LIBERO suite of two tasks."""

    n_tasks = 2

    def __init__(self, states=((1.0,), (2.0,), (3.0,))):
        self.states = np.array(states)

    def get_task(self, i):
        return SimpleNamespace(name=f"task_{i}", language=f"do task {i}")

    def get_task_init_states(self, i):
        return self.states


def run(policy, out, *options, suite=None, solved_at=3, broken_at=None, max_steps=20):
    """The log of a run; the suite's limit is lowered."""
    suite, log = suite or Suite(), []
    args = libero_client.parse(["--suite", "libero_spatial", "--out", str(out), "--trials", "2", *options])
    stream = Replanner(policy, replan_steps=args.replan_steps, seed=args.seed)
    header = header_of(suite, stream, policy.metadata, args)
    assert header["max_steps"] == 220
    header["max_steps"] = max_steps
    made = [Simulator(log, solved_at, broken_at) for _ in range(suite.n_tasks)]
    run_suite(suite, lambda task: made.pop(), stream, header=header, out=out, tell=lambda line: None)
    return log


def test_libero_trials_follow_the_protocol(libero_policy, tmp_path):
    out = tmp_path / "spatial.jsonl"
    log = run(libero_policy, out, "--replan-steps", "2")
    assert [value for kind, value in log if kind == "state"] == [1.0, 2.0, 1.0, 2.0]
    actions = [value for kind, value in log if kind == "action"]
    assert len(actions) == 4 * (10 + 3)
    assert actions[:10] == [NO_OP] * 10
    assert {len(action) for action in actions} == {7}
    header, *lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["tasks"] == ["task_0", "task_1"]
    assert lines[0] == {"task": "task_0", "trial": 0, "success": True, "steps": 3}
    sent = libero_policy.sent
    assert len(sent) == 4 * 2  # three steps, of which two are of one chunk
    first = sent[0]
    assert first["observation/image"].shape == (256, 256, 3)
    assert first["observation/image"][-1, -1].tolist() == [11, 2, 3]  # turned by 180°, after ten steps of nothing
    assert first["observation/wrist_image"][-1, 0].tolist() == [11, 2, 3]
    np.testing.assert_allclose(first["observation/state"], [0.1, 0.2, 0.3, 0, 0, 0.5, 0.01, -0.01], atol=1e-6)
    assert first["prompt"] == "do task 0"
    assert sent[-1]["prompt"] == "do task 1"


def test_no_two_requests_of_a_run_share_their_noise(libero_policy, tmp_path):
    run(libero_policy, tmp_path / "a.jsonl", "--replan-steps", "1")
    seeds = [request["seed"] for request in libero_policy.sent]
    assert len(seeds) == 4 * 3 == len(set(seeds))
    run(libero_policy, tmp_path / "b.jsonl", "--replan-steps", "1", "--seed", "8")
    assert not set(seeds) & {request["seed"] for request in libero_policy.sent[len(seeds) :]}


def test_a_trial_that_is_not_solved_ends_at_the_limit(libero_policy, tmp_path):
    out = tmp_path / "a.jsonl"
    run(libero_policy, out, solved_at=99, max_steps=5)
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    assert {(line["success"], line["steps"]) for line in lines} == {(False, 5)}


@pytest.mark.parametrize(
    ("convention", "open_value"), [("minus1_open", -1.0), ("0_open", 0.0), ("1_open", 1.0)], ids=lambda v: str(v)
)
def test_open_is_minus_one_whatever_the_policy_says(convention, open_value):
    assert libero_client.GRIPPERS[convention](open_value) == -1
    assert libero_client.GRIPPERS[convention]({-1.0: 1.0, 0.0: 1.0, 1.0: 0.0}[open_value]) == 1


def test_a_broken_run_goes_on_and_its_trial_is_not_counted_before(libero_policy, tmp_path):
    out = tmp_path / "a.jsonl"
    with pytest.raises(RuntimeError, match="the simulator broke"):
        run(libero_policy, out, broken_at=12)
    assert len(out.read_text().splitlines()) == 1
    run(libero_policy, out)
    whole = out.read_text()
    out.write_text(whole[:-20])  # killed while the last line was written
    log = run(libero_policy, out)
    assert [value for kind, value in log if kind == "state"] == [2.0]
    assert out.read_text() == whole


def test_another_setting_is_not_mixed_into_a_file(libero_policy, tmp_path):
    run(libero_policy, tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="another seed"):
        run(libero_policy, tmp_path / "a.jsonl", "--seed", "3")


@pytest.mark.parametrize("states", [[(1.0,)], [(1.0,), (1.0,), (2.0,)]], ids=["too few", "copies"])
def test_initial_states_are_never_repeated(libero_policy, tmp_path, states):
    with pytest.raises(UserError, match="trials=2: task 0 has 1 different initial states"):
        run(libero_policy, tmp_path / "a.jsonl", suite=Suite(states))


def test_libero_plus_has_one_trial_per_task(libero_policy, tmp_path):
    with pytest.raises(UserError, match="trials=2: libero_plus has one per task"):
        run(libero_policy, tmp_path / "a.jsonl", "--benchmark", "libero_plus")


# --- LIBERO's results ---

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


def trials_file(folder, suite, *, benchmark="libero", trials=2, won=(), drop=0, **settings):
    header = {
        **{"format": libero_client.FORMAT, "benchmark": benchmark, "suite": suite, "tasks": ["x", "y"]},
        **{"trials": trials, "max_steps": 220, "seed": 7, "policy": {"step": 1}, **settings},
    }
    cells = [(task, trial) for task in header["tasks"] for trial in range(trials)]
    lines = [{"task": t, "trial": i, "success": (t, i) in won, "steps": 9} for t, i in cells][: len(cells) - drop]
    path = folder / f"{suite}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *lines]))
    return path


def test_libero_is_told_by_suite_and_task_and_pooled_when_all_are_there(tmp_path):
    files = [trials_file(tmp_path, suite, won={("x", 0), ("x", 1)}) for suite in SUITES]
    part = import_libero(files[:3], benchmark="libero", out=tmp_path / "part.json")
    assert part["scores"]["total"] is None
    assert (part["total_needs"], part["complete"]) == (["libero_10"], False)
    content = import_libero(files, benchmark="libero", out=tmp_path / "all.json")
    assert content == json.loads((tmp_path / "all.json").read_text())
    total = content["scores"]["total"]
    assert (total["successes"], total["n"], (total["low"], total["high"])) == (8, 16, wilson(8, 16))
    assert content["scores"]["suites"]["libero_goal"]["n"] == 4
    assert content["scores"]["tasks"]["libero_goal/x"]["value"] == 1
    assert content["scores"]["tasks"]["libero_goal/y"]["value"] == 0


def test_missing_and_doubled_trials_are_named_and_not_imported(tmp_path, capsys):
    short = trials_file(tmp_path, "libero_spatial", drop=1)
    twice = trials_file(tmp_path, "libero_object")
    twice.write_text(twice.read_text() + json.dumps({"task": "x", "trial": 0, "success": True, "steps": 1}) + "\n")
    assert main(["benchmark", "check", "libero", str(short), str(twice)]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["suites"]["libero_spatial"] == {"expected": 4, "missing": ["y 1"], "twice": []}
    assert report["suites"]["libero_object"]["twice"] == ["x 0"]
    assert report["not_begun"] == ["libero_goal", "libero_10"]
    with pytest.raises(UserError, match=r"libero_spatial: 1 trials are missing or doubled .y 1"):
        import_libero([short, twice], benchmark="libero", out=tmp_path / "o.json")
    assert check_libero([trials_file(tmp_path, "libero_10")], benchmark="libero")["complete"]


def test_trials_of_two_policies_are_not_pooled(tmp_path):
    files = [trials_file(tmp_path, "libero_spatial"), trials_file(tmp_path, "libero_goal", policy={"step": 2})]
    with pytest.raises(UserError, match="has another policy"):
        import_libero(files, benchmark="libero", out=tmp_path / "o.json")


def test_libero_plus_is_told_by_perturbation(tmp_path):
    kinds = {"x": "Sensor Noise", "y": "Camera Viewpoints"}
    table = {suite: [{"id": 1, "name": name, "category": kind} for name, kind in kinds.items()] for suite in SUITES}
    (tmp_path / "c.json").write_text(json.dumps(table))
    files = [trials_file(tmp_path, s, benchmark="libero_plus", trials=1, won={("x", 0)}) for s in SUITES]
    settings = {"benchmark": "libero_plus", "classification": tmp_path / "c.json"}
    scores = import_libero(files, out=tmp_path / "o.json", **settings)["scores"]
    assert {kind: (s["successes"], s["n"]) for kind, s in scores["perturbations"].items()} == {
        "Sensor Noise": (4, 4),
        "Camera Viewpoints": (0, 4),
    }
    assert scores["total"]["value"] == 0.5
    table["libero_10"].append({"id": 3, "name": "z", "category": "Sensor Noise"})
    (tmp_path / "c.json").write_text(json.dumps(table))
    with pytest.raises(UserError, match=r"libero_10 as it was run: covers 2 of 3 .1 missing: z"):
        check_libero(files, **settings)
