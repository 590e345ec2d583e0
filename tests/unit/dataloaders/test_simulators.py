"""Simulators, their experts, and the demonstrations collected from them."""

import hashlib
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.simulators.base import CAMERA_KEY, TASKS
from dataloaders.simulators.collect import STEPS_AFTER_SUCCESS, EpisodeJob, play, simulate
from dataloaders.simulators.make import make
from dataloaders.simulators.push2d import AGENT_RADIUS, BLOCK_RADIUS, STEP, Push2D
from kairos_train.basics.errors import UserError


def solve(simulator: Push2D, seed: int, noise: float = 0.0, *, driver: Push2D | None = None) -> bool:
    """Whether the expert of `driver` (the simulator's own by default) solves the simulator's task."""
    rng = np.random.default_rng(seed)
    driver = driver or simulator
    for s in {id(simulator): simulator, id(driver): driver}.values():
        s.reset(seed)
    for _ in range(simulator.max_steps):
        action = driver.expert_action() + noise * rng.standard_normal(2)
        if driver is not simulator:
            driver.step(action)
        if simulator.step(action)[1]:
            return True
    return False


# ---- push2d


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("task", list(TASKS["push2d"]))
def test_push2d_expert_solves_unseen_layouts(task, noise):
    simulator = make("push2d", task, 16)
    assert sum(solve(simulator, 10_000 + seed, noise) for seed in range(30)) >= 29


def test_push2d_is_not_solved_by_chance_or_by_the_other_instruction():
    red, blue = make("push2d", "push-red", 16), make("push2d", "push-blue", 16)
    assert sum(solve(red, seed, driver=blue) for seed in range(20)) == 0
    rng = np.random.default_rng(0)
    for seed in range(10):
        red.reset(seed)
        assert not any(red.step(rng.uniform(-1, 1, 2))[1] for _ in range(red.max_steps))


def test_push2d_is_a_function_of_its_seed_and_not_of_the_task():
    red, blue = make("push2d", "push-red", 32), make("push2d", "push-blue", 32)
    red.reset(3)
    for _ in range(30):
        red.step(red.expert_action())
    again, other = red.reset(7), blue.reset(7)
    assert np.array_equal(again.frame, other.frame)
    assert np.array_equal(again.state, other.state)
    assert red.instruction != blue.instruction
    assert not np.array_equal(red.reset(8).frame, again.frame)


def test_push2d_discs_never_overlap_or_leave_the_table():
    simulator = make("push2d", "push-red", 16)
    rng = np.random.default_rng(1)
    for seed in range(5):
        simulator.reset(seed)
        direction = rng.uniform(-1, 1, 2)
        for k in range(200):
            if k % 25 == 0:
                direction = rng.uniform(-1, 1, 2)
            simulator.step(direction)
            agent, (red, blue) = simulator.agent, simulator.blocks
            assert math.dist(red, blue) > 2 * BLOCK_RADIUS - 1e-6
            assert min(math.dist(agent, red), math.dist(agent, blue)) > AGENT_RADIUS + BLOCK_RADIUS - STEP / 2
            assert np.abs(agent).max() <= 1 - AGENT_RADIUS + 1e-9
            assert np.abs([red, blue]).max() <= 1 - BLOCK_RADIUS + 1e-9


def test_push2d_agent_pushes_a_block_and_that_one_the_other():
    simulator = make("push2d", "push-red", 16)
    simulator.reset(0)
    simulator.agent, simulator.blocks = [-0.6, 0.0], [[-0.35, 0.0], [0.0, 0.0]]
    for _ in range(15):
        simulator.step(np.array([1.0, 0.0]))
    assert simulator.agent == pytest.approx([0.0, 0.0])
    assert simulator.blocks[0] == pytest.approx([AGENT_RADIUS + BLOCK_RADIUS, 0.0])
    assert simulator.blocks[1] == pytest.approx([AGENT_RADIUS + 3 * BLOCK_RADIUS, 0.0])


@pytest.mark.parametrize(("degrees", "follows"), [(0, True), (30, True), (-30, True), (45, False), (-45, False)])
def test_push2d_a_pushed_block_goes_the_agents_way_until_it_slides_off(degrees, follows):
    simulator = make("push2d", "push-red", 16)
    simulator.reset(0)
    angle, reach = math.radians(degrees), AGENT_RADIUS + BLOCK_RADIUS
    simulator.agent = [-reach * math.cos(angle), -reach * math.sin(angle)]  # of the block in the middle
    simulator.blocks = [[0.0, 0.0], [0.8, 0.8]]
    for _ in range(3):
        simulator.step(np.array([1.0, 0.0]))
    x, y = simulator.blocks[0]
    if follows:
        assert (x, y) == pytest.approx((3 * STEP, 0.0), abs=2e-3)
    else:
        assert x < 3 * STEP - 1e-3
        assert y * degrees > 0, "out of the way, to its own side"
        assert abs(math.atan2(y, x)) < abs(angle), "and less so than a smooth one"


def test_push2d_actions_beyond_one_are_clipped_and_the_state_is_the_agents_place():
    simulator = make("push2d", "push-red", 16)
    before = simulator.reset(0).state
    after, solved = simulator.step(np.array([0.5, -7.0]))
    assert after.state - before == pytest.approx([STEP / 2, -STEP], abs=1e-6)
    assert (after.state.dtype, after.state.shape, solved) == (np.float32, (simulator.state_dim,), False)


def test_push2d_red_is_mostly_but_not_always_on_the_left():
    simulator, left = make("push2d", "push-red", 16), 0
    for seed in range(300):
        simulator.reset(seed)
        red, blue = simulator.blocks
        left += red[0] < blue[0]
        assert abs(red[0] - blue[0]) >= 0.6 > 2 * BLOCK_RADIUS
        assert simulator.agent[1] < min(red[1], blue[1]) - BLOCK_RADIUS < simulator.goal[1]
    assert 0.7 < left / 300 < 0.9


@pytest.mark.parametrize("size", [32, 64, 130])
def test_push2d_picture_shows_the_scene_the_right_way_up(size):
    simulator = make("push2d", "push-blue", size)
    simulator.reset(0)
    simulator.agent, simulator.blocks = [-0.7, 0.7], [[0.7, 0.7], [-0.7, -0.7]]
    frame = simulator.step(np.zeros(2))[0].frame
    assert (frame.shape, frame.dtype) == ((size, size, 3), np.uint8)

    def at(x: float, y: float) -> np.ndarray:
        return frame[int((1 - y) / 2 * size), int((x + 1) / 2 * size)].astype(int)

    assert at(-0.7, 0.7).max() < 60  # the dark agent, top left
    assert at(0.7, 0.7).argmax() == 0  # red, top right
    assert at(-0.7, -0.7).argmax() == 2  # blue, bottom left
    assert at(0.98, -0.98).min() > 180  # the bare table
    corners = [at(x, y) for y in (0.98, -0.98) for x in (-0.98, 0.98)]
    assert [corner[0] > 226 for corner in corners] == [False, True, False, True]  # its colour tells the place
    assert [corner[2] > 214 for corner in corners] == [True, True, False, False]


def test_push2d_edges_are_smooth():
    simulator = make("push2d", "push-red", 64)
    simulator.reset(0)
    simulator.blocks[0] = [0.5, 0.5]
    frames = []
    for x in (0.5, 0.505):
        simulator.blocks[0][0] = x
        frames.append(simulator.step(np.zeros(2))[0].frame.astype(int))
    change = np.abs(frames[1] - frames[0])
    assert 0 < change.max() < 60  # a sixth of a pixel moves the edge's shade, not whole pixels


def test_unknown_names_and_sizes_are_refused():
    with pytest.raises(UserError, match="env is 'libero'"):
        make("libero", None, 64)
    with pytest.raises(UserError, match="push-red, push-blue"):
        make("push2d", "push-green", 64)
    with pytest.raises(UserError, match="size is 65"):
        make("push2d", None, 65)


# ---- collection


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


def collect(out: Path, **settings) -> dict:
    arguments = {"env": "push2d", "tasks": [], "episodes_per_task": 2, "size": 32, "processes": 1} | settings
    return simulate(out=out, **arguments)


def test_collected_set_holds_every_task_with_its_instruction_and_seeds(tmp_path):
    summary = collect(tmp_path / "set", episodes_per_task=3, seed_start=50)
    dataset = LeRobotDataset(tmp_path / "set")
    assert (summary["episodes"], summary["dropped"], summary["seeds"]) == (6, 0, [50, 52])
    assert summary["frames"] == sum(e.length for e in dataset)
    assert (dataset.version, dataset.camera_keys, dataset.fps) == ("v3.0", [CAMERA_KEY], 20.0)
    assert [e.tasks for e in dataset] == [[text] for text in TASKS["push2d"].values() for _ in range(3)]
    assert [e.extra["seed"] for e in dataset] == [50, 51, 52] * 2


def test_collection_does_not_depend_on_the_number_of_processes(tmp_path):
    for processes in (1, 2):
        collect(tmp_path / str(processes), processes=processes)
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def replay(simulator, seed: int, actions: np.ndarray) -> list[bool]:
    simulator.reset(seed)
    return [simulator.step(action)[1] for action in actions]


def test_clean_demonstrations_end_five_steps_after_success():
    simulator = make("push2d", "push-red", 16)
    demonstration = play(simulator, EpisodeJob("push2d", "push-red", 16, seed=4, noise=0.2))  # an even seed: no noise
    solved = replay(simulator, 4, demonstration.action)
    assert solved.index(True) == len(solved) - STEPS_AFTER_SUCCESS - 1


def test_noisy_demonstrations_record_what_the_expert_wanted():
    simulator = make("push2d", "push-red", 16)
    noisy = play(simulator, EpisodeJob("push2d", "push-red", 16, seed=5, noise=0.2))
    clean = play(simulator, EpisodeJob("push2d", "push-red", 16, seed=5, noise=0.0))
    executed = np.diff(noisy.state[:, :2], axis=0) / STEP
    free = np.abs(executed).max(axis=1) < 0.99  # steps that were not clipped
    deviation = (executed - noisy.action[:-1])[free]
    assert 0.1 < deviation.std() < 0.3
    assert np.array_equal(noisy.state[0], clean.state[0])
    assert np.array_equal(noisy.action[0], clean.action[0])
    assert np.diff(clean.state[:, :2], axis=0) / STEP == pytest.approx(clean.action[:-1], abs=1e-4)
    # From each state that it was thrown into, the recorded action is the expert's own.
    simulator.reset(5)
    assert noisy.action[0] == pytest.approx(simulator.expert_action())


def test_failed_episodes_are_dropped_counted_and_replaced(tmp_path, monkeypatch):
    simulator, lengths = make("push2d", "push-red", 16), []
    while sum(length <= 45 for length in lengths) < 3:
        lengths.append(len(play(simulator, EpisodeJob("push2d", "push-red", 16, len(lengths), 0.0)).action))
    solved = [seed for seed, length in enumerate(lengths) if length <= 45]
    monkeypatch.setattr(Push2D, "max_steps", 45 - STEPS_AFTER_SUCCESS)
    summary = collect(tmp_path / "set", tasks=["push-red"], episodes_per_task=3, size=16, noise=0.0)
    assert [e.extra["seed"] for e in LeRobotDataset(tmp_path / "set")] == solved
    assert summary["dropped"] == summary["dropped_by_task"]["push-red"] == len(lengths) - 3 > 0
    assert summary["seeds"] == [0, len(lengths) - 1]


def test_an_expert_that_always_fails_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Push2D, "max_steps", 1)
    with pytest.raises(UserError, match="the expert failed"):
        collect(tmp_path / "set", size=16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "maze"}, "env is 'maze'"),
        ({"tasks": ["push-red", "push-red"]}, "named once"),
        ({"episodes_per_task": 0}, "episodes_per_task is 0"),
        ({"processes": 0}, "processes is 0"),
        ({"codec": "vp9"}, "codec is 'vp9'"),
        ({"noise": -0.1}, "noise is -0.1"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        collect(tmp_path / "set", **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_a_worker_reaches_the_caller(tmp_path):
    from dataloaders.simulators import collect as module

    broken = [EpisodeJob("push2d", "push-red", 16, seed, 0.0) for seed in (0, -1, 2)]  # -1 is no seed
    with pytest.raises(RuntimeError, match="simulator process failed"):
        list(module._play_apart(broken, 2))


# ---- Meta-World


@pytest.fixture
def metaworld_skipped() -> None:
    _need_metaworld()
    try:
        make("metaworld", None, 64).close()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("metaworld_skipped")
def test_metaworld_demonstration_is_collected(tmp_path):
    summary = simulate(
        env="metaworld",
        tasks=["button-press-topdown-v3"],
        episodes_per_task=1,
        out=tmp_path / "set",
        size=64,
        processes=1,
    )
    dataset = LeRobotDataset(tmp_path / "set")
    e = dataset.episode(0)
    assert summary["episodes"] == 1
    assert e.tasks == ["Press a button from the top"]
    assert e.columns["action"].shape == e.columns["observation.state"].shape == (e.length, 4)
    assert np.abs(e.columns["action"]).max() <= 1
    frames = e.frames(CAMERA_KEY, [0, e.length - 1]).astype(int)
    assert frames.shape == (2, 64, 64, 3)
    assert np.abs(frames[1] - frames[0]).mean() > 1  # the arm moved
    wall, table = frames[0, :8, 40:].mean(axis=(0, 1)), frames[0, -8:, 40:].mean(axis=(0, 1))
    assert np.ptp(wall) < 30 < np.ptp(table)  # the grey wall is above, the brown table below


@pytest.mark.usefixtures("metaworld_skipped")
def test_metaworld_episode_is_a_function_of_its_seed():
    simulator = make("metaworld", "drawer-open-v3", 64)
    try:
        runs = []
        for seed in (3, 9, 3):
            observations = [simulator.reset(seed)]
            observations += [simulator.step(simulator.expert_action())[0] for _ in range(5)]
            runs.append(observations)
    finally:
        simulator.close()
    for first, again in zip(runs[0], runs[2]):
        assert np.array_equal(first.frame, again.frame)
        assert np.array_equal(first.state, again.state)
    assert not np.array_equal(runs[0][0].frame, runs[1][0].frame)


def test_a_missing_gl_library_is_named_with_its_package():
    _need_metaworld()
    if _loads("libOSMesa.so.8"):
        pytest.skip("libosmesa6 is installed: nothing is missing")
    code = "from dataloaders.simulators.make import make; make('metaworld', None, 64)"
    environment = os.environ | {"MUJOCO_GL": "osmesa"}
    environment.pop("PYOPENGL_PLATFORM", None)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert "UserError: env metaworld: cannot render with MUJOCO_GL=osmesa" in last
    assert "libosmesa6" in last
    assert "--env push2d" in last


def _need_metaworld() -> None:
    if importlib.util.find_spec("metaworld") is None:  # importing it here would be too early: no GL backend is chosen
        pytest.skip("needs kairos-train[sim]")


def _loads(library: str) -> bool:
    import ctypes

    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
