"""`import kairos_train as kt`: what it offers, what that imports, and how a policy acts in one's own process."""

import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from support.alone import ALONE, installed_with
from support.serving_exports import config_of, picture, write_export

import kairos_train as kt
from dataloaders.windows import cover
from kairos_train.basics.extras import EXTRAS, missing_extra
from kairos_train.serving.policy import ServedPolicy

ROOT = Path(__file__).resolve().parents[3]
CAMERA, STATE = "observation.images.top", "observation.state"
OBSERVATION = {CAMERA: picture(0), STATE: np.array([1.0, -2.0]), "task": "push"}


@pytest.fixture(scope="module")
def policy(exported) -> kt.Policy:
    return kt.load(exported, device="cpu")


# --- the package ---


def test_importing_the_package_imports_nothing_else_and_names_what_it_offers():
    code = (
        "import sys; before = set(sys.modules); import kairos_train as kt\n"
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))\n"
        "print([name for name in sys.modules if name.startswith('kairos_train.')])\n"
        "print(sorted(set(kt.__all__) - set(dir(kt))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.splitlines() == ["{'kairos_train'}", "[]", "[]"]


@pytest.mark.parametrize("name", [name for name in kt.__all__ if callable(getattr(kt, name))])
def test_all_that_is_offered_is_documented_and_typed(name):
    offered = getattr(kt, name)
    members = [m for m in vars(offered).values() if inspect.isfunction(m)] if inspect.isclass(offered) else [offered]
    assert inspect.getdoc(offered)
    for function in members:
        signature = inspect.signature(function)
        typed = [p.annotation for p in signature.parameters.values() if p.name != "self"] + [
            signature.return_annotation
        ]
        assert inspect.Signature.empty not in typed, function
    assert (ROOT / "kairos_train/py.typed").exists()


def test_another_name_is_no_attribute():
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        kt.lode  # noqa: B018


# --- without the extras ---

ACT = f"""
import numpy as np
import torch
torch.set_num_threads(1)
import kairos_train as kt
policy = kt.load(sys.argv[1], device="cpu")
print(policy.act({{"{CAMERA}": np.zeros((48, 64, 3), np.uint8), "{STATE}": [0.5, 2], "task": "push"}}, seed=3).shape)
try:
    kt.train(["experiment=demo"])
except kt.UserError as error:
    print(error)
from kairos_train.cli import main
print(main(["config"]))
"""


def test_a_policy_acts_where_the_project_is_installed_without_extras(exported):
    names = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = installed_with(re.match(r"[\w.-]+", name)[0] for name in names)
    done = subprocess.run(
        [sys.executable, "-c", ALONE.format(distributions=allowed) + ACT, exported],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    told = "yaml is not installed; run `pip install 'kairos-train[train]'`"
    assert done.stdout.splitlines() == ["(8, 3)", told, "2"]
    assert done.stderr == f"kairos-train: error: {told}\n"


def test_every_extra_brings_the_packages_that_it_is_said_to_bring():
    """Of each package the distribution stands in the extra's list, or is one that a listed distribution needs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        listed = [re.match(r"[\w.-]+", line)[0] for line in extras[extra] if not line.startswith("kairos-train")]
        assert set(packages) <= installed_with(listed), extra


def test_a_package_that_no_extra_brings_is_a_fault_of_its_own():
    assert missing_extra(ModuleNotFoundError("No module named 'mine'", name="mine")) is None
    assert "[serve]" in str(missing_extra(ModuleNotFoundError("", name="websockets.asyncio.server")))


# --- a policy ---


def test_actions_are_those_of_the_server(policy, exported):
    served = ServedPolicy(exported)
    read = served.reader.read({CAMERA: OBSERVATION[CAMERA], STATE: OBSERVATION[STATE], "prompt": "push", "seed": 5})
    wanted = served.act([served.history().window(read)])[0]
    actions = policy.act(OBSERVATION, seed=5)
    assert actions.dtype == np.float32
    assert actions.shape == (policy.metadata["horizon"], policy.metadata["action_dim"]) == (8, 3)
    np.testing.assert_allclose(actions, wanted, atol=1e-6)


def test_a_seed_gives_the_same_actions_again_and_none_gives_others(policy):
    first, again, other = (policy.act(OBSERVATION, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    assert np.abs(policy.act(OBSERVATION) - policy.act(OBSERVATION)).max() > 1e-3


def test_pictures_of_any_size_are_cut_as_for_training(policy):
    large = picture(3, 100, 70)
    small = cover(large[None], 32, 32)[0]
    np.testing.assert_array_equal(
        policy.act({**OBSERVATION, CAMERA: large}, seed=1), policy.act({**OBSERVATION, CAMERA: small}, seed=1)
    )


def test_lists_are_arrays_and_the_protocols_word_for_the_instruction_works(policy):
    plain = {CAMERA: OBSERVATION[CAMERA].tolist(), STATE: [1, -2], "prompt": "push"}
    plain[CAMERA] = np.array(plain[CAMERA], np.uint8)
    np.testing.assert_array_equal(policy.act(plain, seed=4), policy.act(OBSERVATION, seed=4))
    assert policy.observation_keys == (CAMERA, STATE, "task")
    assert repr(policy).startswith(
        f"Policy(observation_keys=['{CAMERA}', '{STATE}', 'task'], state_dim=2, action_dim=3"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({CAMERA: None}, f"'{CAMERA}': is a NoneType; send"),
        ({STATE: [1, 2, 3]}, f"'{STATE}': has shape [3]; send (2,)"),
        ({"observation.imags.top": picture(1)}, f"did you mean '{CAMERA}'?"),
        ({"prompt": "push"}, "has 'task' and 'prompt'"),
        ({"task": 3}, "'task': is a int"),
    ],
)
def test_an_observation_that_does_not_fit_is_named(policy, change, message):
    with pytest.raises(kt.UserError, match=re.escape(message)):
        policy.act({**OBSERVATION, **change})


def test_earlier_frames_are_remembered_until_reset(tmp_path):
    policy = kt.load(write_export(tmp_path / "two", config_of(history_frames=2, frames=9)), device="cpu")
    seen = [{**OBSERVATION, CAMERA: picture(n), STATE: [n / 10, 0]} for n in range(2)]
    fresh = policy.act(seen[1], seed=0)
    policy.reset()
    policy.act(seen[0], seed=0)
    assert np.abs(policy.act(seen[1], seed=0) - fresh).max() > 1e-4
    policy.reset()
    np.testing.assert_array_equal(policy.act(seen[1], seed=0), fresh)


# --- the steps before ---


def test_settings_are_composed_as_on_the_command_line():
    config = kt.compose(["experiment=demo", "train.steps=3"])
    assert (config.train.steps, config.model.name, config.stage.init_from) == (3, "tiny", None)
    with pytest.raises(kt.UserError, match=r"did you mean train\.steps"):
        kt.compose(["train.stesp=3"])
    with pytest.raises(kt.UserError, match=r"is one text; give a list"):
        kt.compose("experiment=demo")
