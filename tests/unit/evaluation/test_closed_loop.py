"""Episodes in the pushing simulator: intervals, seeds, references, processes. No policy server here."""

import importlib.util
import math
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest

from dataloaders.simulators.base import TASKS
from dataloaders.simulators.collect import simulate
from dataloaders.simulators.make import make
from evaluation.closed_loop import run
from evaluation.closed_loop.demonstrations import open_demonstrations, read_demonstrations, seeds_of
from evaluation.closed_loop.episode import Episode, EpisodeOutcome, noise_seed
from evaluation.closed_loop.episodes import play
from evaluation.closed_loop.policies import ExpertPolicy, HoldPolicy, RandomPolicy, ReplayPolicy, another_task
from evaluation.closed_loop.report import summarise
from evaluation.closed_loop.run import PolicySource, Protocol, check_seeds, closed_loop
from evaluation.closed_loop.workers import Setup, Table, play_all
from evaluation.intervals import Z95, wilson
from kairos_train.basics.errors import RunStopped, UserError

SETUP = Setup(size=32, replan_every=4, concurrent=4)


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Five demonstrations of each task, seeds 0 to 4; read only."""
    out = tmp_path_factory.mktemp("demos") / "set"
    simulate(env="push2d", tasks=[], episodes_per_task=5, out=out, size=32, processes=1)
    return out


def episode(policy: str = "expert", seed: int = 10_000, task: str = "push-red") -> Episode:
    return Episode(policy, "push2d", task, seed)


def outcome_of(policy, which: Episode, *, replan_every: int = 4) -> EpisodeOutcome:
    """The outcome of an episode of a policy that does not wait."""
    game = play(make("push2d", which.task, 32), policy, which, replan_every=replan_every)
    try:
        wanted = next(game)
        while True:
            wanted = game.send(wanted())
    except StopIteration as end:
        return end.value


# --- intervals ---


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (5, 10, 0.23659, 0.76341),
        (69, 100, 0.59370, 0.77225),
        (70, 75, 0.85324, 0.97119),
    ],
)
def test_wilsons_interval_has_its_known_values(successes, episodes, low, high):
    assert wilson(successes, episodes) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_bounds_are_the_rates_from_which_the_observed_one_is_z_standard_errors_away():
    for successes, episodes in ((1, 3), (37, 50), (149, 150)):
        for bound in wilson(successes, episodes):
            error = math.sqrt(bound * (1 - bound) / episodes)
            assert abs(successes / episodes - bound) == pytest.approx(Z95 * error)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 4)])
def test_impossible_counts_are_refused(successes, episodes):
    with pytest.raises(ValueError, match="successes of"):
        wilson(successes, episodes)


# --- one episode ---


def test_noise_differs_by_task_seed_and_replan_and_not_by_the_instruction_that_is_told():
    seeds = {
        noise_seed(episode("model", seed, task), replan)
        for task in TASKS["push2d"]
        for seed in (10_000, 10_001)
        for replan in range(30)
    }
    assert len(seeds) == 2 * 2 * 30
    assert max(seeds) < 2**48
    assert noise_seed(episode("model"), 3) == noise_seed(episode("wrong"), 3)


class Scripted:
    """Gives its plans one after another, then stands still; remembers what it was shown."""

    waits = False

    def __init__(self, plans, looks_every=4):
        self.plans, self.looks_every, self.seen = iter(plans), looks_every, []

    def begin(self, simulator, episode, first):
        self.simulator = simulator

    def plan(self, seen):
        self.seen.append([observation.state for observation in seen])
        return next(self.plans, np.zeros((8, 2)))


def test_the_first_actions_of_each_plan_are_executed_and_the_newest_scene_is_shown():
    right, up = np.tile([1.0, 0.0], (8, 1)), np.tile([0.0, 1.0], (8, 1))
    policy = Scripted([right, up, right])
    which = episode(seed=10_001)
    assert outcome_of(policy, which) == EpisodeOutcome(False, 120)
    simulator = make("push2d", which.task, 32)
    states = [simulator.reset(which.seed).state]
    for plan in (right, up, right):
        states += [simulator.step(action)[0].state for action in plan[:4]]
    assert [len(seen) for seen in policy.seen] == [1] * 30
    np.testing.assert_array_equal([seen[0] for seen in policy.seen[:4]], states[::4])


def test_frames_between_two_plans_are_shown_to_a_policy_that_wants_them():
    policy = Scripted([np.zeros((8, 2))] * 2, looks_every=2)
    outcome_of(policy, episode())
    assert [len(seen) for seen in policy.seen] == [1] + [2] * 29


def test_an_episode_ends_at_the_simulators_limit():
    assert outcome_of(HoldPolicy(), episode("hold")) == EpisodeOutcome(False, 120)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (np.full((4, 2), np.nan), "ValueError: a plan that is not finite"),
        (np.zeros((4, 3)), r"ValueError: a plan of shape [4, 3]; the simulator takes (n, 2)"),
        (np.zeros((0, 2)), "ValueError: a plan of shape [0, 2]"),
    ],
)
def test_an_unusable_plan_is_a_failure_with_its_reason(plan, reason):
    found = outcome_of(Scripted([np.zeros((4, 2)), plan]), episode())
    assert (found.success, found.steps) == (False, 4)
    assert reason in found.error


@pytest.mark.parametrize("task", list(TASKS["push2d"]))
def test_observing_after_advancing_is_a_step(task):
    one, other = make("push2d", task, 32), make("push2d", task, 32)
    for simulator in (one, other):
        simulator.reset(5)
    for _ in range(60):
        action = one.expert_action()
        (seen, solved), also = one.step(action), other.advance(action)
        assert solved == also
        np.testing.assert_array_equal(seen.frame, other.observe().frame)
        np.testing.assert_array_equal(seen.state, other.observe().state)


# --- references ---


def test_the_expert_solves_and_neither_chance_nor_standing_still_does():
    for seed in (10_000, 10_001, 10_002):
        assert outcome_of(ExpertPolicy(), episode(seed=seed)).success
        assert not outcome_of(RandomPolicy(), episode("random", seed)).success
        assert not outcome_of(HoldPolicy(), episode("hold", seed)).success


def test_random_actions_are_of_the_episode():
    def drawn(seed: int) -> np.ndarray:
        policy = RandomPolicy()
        policy.begin(make("push2d", "push-red", 32), episode("random", seed), None)
        return np.concatenate([policy.plan([]) for _ in range(500)])

    first = drawn(10_000)
    np.testing.assert_array_equal(first, drawn(10_000))
    assert not np.array_equal(first, drawn(10_001))
    assert np.abs(first).max() <= 1
    assert np.abs(first).mean() == pytest.approx(0.5, abs=0.03)


def test_replay_plays_the_demonstration_that_began_most_alike(demos):
    simulator = make("push2d", "push-red", 32)
    dataset = open_demonstrations(demos, simulator)
    known = read_demonstrations(dataset, "push2d", list(TASKS["push2d"]), simulator.camera_key)
    clean = [entry for entry in dataset if entry.extra["seed"] % 2 == 0]
    assert len(clean) == 6
    for entry in clean:
        task = next(task for task, text in TASKS["push2d"].items() if text in entry.tasks)
        seed = entry.extra["seed"]
        np.testing.assert_array_equal(known.nearest(task, simulator.reset(seed)), entry.columns["action"])
        # Of its own layout the demonstration is a solution, of any other it would be luck.
        assert outcome_of(ReplayPolicy(known), episode("replay", seed, task)).success
    assert sum(outcome_of(ReplayPolicy(known), episode("replay", 10_000 + seed)).success for seed in range(5)) <= 2


def test_the_nearest_demonstration_is_near_in_the_picture(demos):
    simulator = make("push2d", "push-red", 32)
    known = read_demonstrations(open_demonstrations(demos, simulator), "push2d", ["push-red"], simulator.camera_key)
    simulator.reset(2)
    simulator.blocks[0][0] += 0.1
    assert known.tasks["push-red"].nearest(simulator.observe()) == 1  # seeds 0, 2, 4


@pytest.mark.parametrize(
    ("env", "task", "other"),
    [
        ("push2d", "push-red", "push-blue"),
        ("push2d", "push-blue", "push-red"),
        ("metaworld", "window-open-v3", "button-press-topdown-v3"),
        ("metaworld", "reach-v3", "button-press-topdown-v3"),
    ],
)
def test_the_wrong_instruction_is_another_tasks(env, task, other):
    assert another_task(env, task) == other


# --- processes ---


def test_outcomes_do_not_depend_on_processes_or_order():
    episodes = [episode(name, 10_000 + seed) for name in ("expert", "random") for seed in range(4)]
    table = Table(SETUP)
    alone = dict(table.begin(number, which)[0] for number, which in enumerate(episodes))
    table.close()
    together = list(play_all(episodes, SETUP, processes=2))
    assert len(together) == len(episodes)
    assert dict(together) == {which: alone[number] for number, which in enumerate(episodes)}
    assert [alone[number].success for number in range(8)] == [True] * 4 + [False] * 4


def test_the_episodes_of_a_process_that_dies_have_failed_and_the_others_are_played():
    episodes = [episode(seed=10_000 + seed) for seed in range(12)]
    found = {}
    for which, outcome in play_all(episodes, SETUP, processes=1):
        if not found:
            (child,) = multiprocessing.active_children()
            child.kill()
        assert which not in found
        found[which] = outcome
    assert found.keys() == set(episodes)
    died = [o for o in found.values() if o.error == "its simulator process died with exit code -9"]
    assert 1 <= len(died) <= SETUP.concurrent
    assert not any(o.success for o in died)
    assert all(o.success for o in found.values() if o not in died)
    assert multiprocessing.active_children() == []


def test_processes_that_die_again_and_again_stop_the_evaluation():
    def kill_each(outcomes) -> None:
        for _ in outcomes:
            for child in multiprocessing.active_children():
                child.kill()

    with pytest.raises(RunStopped, match="3 simulator processes died, the last with exit code -9"):
        kill_each(play_all([episode(seed=10_000 + seed) for seed in range(40)], SETUP, processes=1))


def test_an_episode_whose_simulator_cannot_be_made_has_failed():
    table = Table(Setup(size=33, replan_every=4, concurrent=1))
    ((number, outcome),) = table.begin(7, episode())
    table.close()
    assert (number, outcome.success) == (7, False)
    assert outcome.error.startswith("UserError: size is 33")


def test_a_simulator_process_loads_no_torch():
    code = "import sys, evaluation.closed_loop.workers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- the protocol ---


def test_seeds_of_demonstrations_are_refused(demos):
    known = seeds_of(open_demonstrations(demos, make("push2d", None, 32)))
    assert known == {0, 1, 2, 3, 4}
    with pytest.raises(UserError, match="seed_start=3: seeds 3 to 4 are those of demonstrations; start at 10000"):
        check_seeds(Protocol("push2d", episodes=2, seed_start=3), known)
    check_seeds(Protocol("push2d", episodes=2, seed_start=5), known)
    with pytest.raises(UserError, match="seed_start=4999: seeds below 5000 are for demonstrations"):
        check_seeds(Protocol("push2d", seed_start=4999), None)
    check_seeds(Protocol("push2d", seed_start=5000), None)
    assert Protocol("push2d").seed_start == 10_000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": "maze"}, "env is 'maze'"),
        ({"tasks": ["push-green"]}, "task is 'push-green'"),
        ({"tasks": ["push-red", "push-red"]}, "tasks=push-red,push-red: name at least one, and each once"),
        ({"policies": []}, "policies=: name at least one"),
        ({"policies": ["expert", "expert"]}, "policies=expert,expert"),
        ({"policies": ["oracle"]}, "policies: 'oracle' is unknown; choose from model"),
        ({"episodes": 0}, "episodes=0: must be 1 or more"),
        ({"seed_start": -1}, "seed_start=-1"),
        ({"replan_every": 0}, "replan_every=0"),
        ({"processes": 0}, "processes=0"),
        ({"concurrent": 65}, "concurrent=65"),
        ({"policies": ["model"]}, "need an export or a server"),
        ({"policies": ["replay"]}, "replay needs demonstrations; give --demos DATASET"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_bad_settings_are_refused_before_anything_is_made(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        closed_loop(Protocol(**{"env": "push2d", **settings}), PolicySource(), demos=None, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_demonstrations_of_another_robot_are_refused(demos):
    simulator = make("push2d", None, 32)
    simulator.robot_type = "sawyer"
    with pytest.raises(UserError, match="robot_type is disc, the simulator has sawyer"):
        open_demonstrations(demos, simulator)


def test_every_policy_plays_every_seed_of_every_task_once(demos, tmp_path, capsys):
    policies = ("expert", "hold", "replay")
    protocol = Protocol("push2d", episodes=3, policies=policies, processes=1)
    result = closed_loop(protocol, PolicySource(), demos=demos, out=tmp_path)
    wanted = [(task, seed) for task in TASKS["push2d"] for seed in (10_000, 10_001, 10_002)]
    assert list(result["policies"]) == list(policies)
    for found in result["policies"].values():
        assert [(e["task"], e["seed"]) for e in found["episodes"]] == wanted
        assert found["all"]["successes"] == sum(e["success"] for e in found["episodes"])
    assert result["policies"]["expert"]["all"] == {
        "successes": 6,
        "episodes": 6,
        "rate": 1.0,
        "interval95": list(wilson(6, 6)),
    }
    assert all(e["steps"] == 120 for e in result["policies"]["hold"]["episodes"])
    assert "expert: 6 of 6 episodes solved" in capsys.readouterr().err


def test_a_crashed_episode_counts_as_a_failure():
    pairs = [(episode(seed=1), EpisodeOutcome(True, 50)), (episode(seed=0), EpisodeOutcome(False, 3, "ValueError: x"))]
    found = summarise(pairs, policies=["expert"], tasks=["push-red"])["expert"]
    assert found["all"] == {"successes": 1, "episodes": 2, "rate": 0.5, "interval95": list(wilson(1, 2))}
    assert found["tasks"] == {"push-red": found["all"]}
    assert found["episodes"] == [
        {"task": "push-red", "seed": 0, "success": False, "steps": 3, "error": "ValueError: x"},
        {"task": "push-red", "seed": 1, "success": True, "steps": 50, "error": None},
    ]


def test_a_crash_is_named_on_stderr(capsys):
    protocol = Protocol("push2d", episodes=1, policies=["expert"], processes=1)
    odd = Setup(size=33, replan_every=4, concurrent=1)  # no simulator makes such pictures
    ((_, outcome),) = run._play(protocol, ["push-red"], odd)
    said = capsys.readouterr().err
    assert f"expert, push-red, seed 10000 crashed: {outcome.error}" in said
    assert "expert: 0 of 1 episodes solved" in said


# --- Meta-World ---


def test_metaworlds_expert_is_judged_without_a_picture_but_the_first():
    if importlib.util.find_spec("metaworld") is None:  # importing it here would be too early: no GL backend is chosen
        pytest.skip("needs kairos-train[sim]")
    table = Table(Setup(size=32, replan_every=4, concurrent=1))
    try:
        ((_, outcome),) = table.begin(0, Episode("expert", "metaworld", "button-press-topdown-v3", 10_000))
    finally:
        table.close()
    if (outcome.error or "").startswith("UserError: env metaworld"):
        pytest.skip(outcome.error)
    assert outcome.success, outcome.error
    assert outcome.steps < 200
