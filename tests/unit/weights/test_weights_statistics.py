"""Statistics of imported weights: which file, which entry, which normalisation; nothing is guessed."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.public_weights import HEADER, save, tiny_weights
from support.tiny_export import tiny_config

from kairos_train import cli
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.config.compose import load_config
from kairos_train.inference.load import load
from kairos_train.inference.predict import normalizers
from kairos_train.weights.export import export
from kairos_train.weights.import_public import import_weights
from kairos_train.weights.statistics import imported_statistics, public_statistics, statistics_file

ZSCORE = ("data.normalize_action=zscore", "data.normalize_state=zscore")


def entry(dims: int, scale: float = 1.0) -> dict:
    numbers = {"min": -1.0, "max": 1.0, "mean": 0.5, "std": 2.0, "q01": -0.9, "q99": 0.9}
    return {f"global_{name}": [scale * value] * dims for name, value in numbers.items()}


def published(state: int = 2, action: int = 3, **more) -> dict:
    return {"state": {"default": entry(state)}, "action": {"default": entry(action, 3.0)}, "num_episodes": 7, **more}


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def checked(file, given, *, exported=False, actions=True):
    return imported_statistics(file, tiny_config(actions=actions), given, exported=exported)


NAMES = ["dataset_stats.json", "robotwin_dataset_stats.json", "libero_plus_dataset_stats.json"]


@pytest.mark.parametrize("name", NAMES)
def test_published_file_names_are_found_beside_the_weights(tmp_path, name):
    assert statistics_file(tmp_path) is None
    write(tmp_path / name, published())
    write(tmp_path / "other.json", {})
    assert statistics_file(tmp_path).name == name


def test_of_several_files_one_must_be_named(tmp_path):
    for name in NAMES[1:]:
        write(tmp_path / name, published())
    with pytest.raises(
        UserError, match=r"libero_plus_dataset_stats\.json, robotwin_dataset_stats\.json; .*--statistics"
    ):
        statistics_file(tmp_path)


@pytest.mark.parametrize(
    "given", [("data",), ("experiment",), ("data.normalize_action", "data.normalize_state"), ("data", "model")]
)
def test_a_preset_or_the_command_line_says_how_they_normalise(tmp_path, given):
    write(tmp_path / "s.json", published())
    found = checked(tmp_path / "s.json", given)
    assert found["state"] == {"observation.state": entry(2)}
    assert found["action"] == {"action": entry(3, 3.0)}
    assert found["num_episodes"] == 7


@pytest.mark.parametrize("given", [(), ("data.normalize_action",), ("data.window.frames", "model")])
def test_without_a_word_the_two_choices_are_named(tmp_path, given):
    write(tmp_path / "s.json", published())
    with pytest.raises(UserError, match=r"data=robotwin \(z-score\) or data=libero \(min/max\)"):
        checked(tmp_path / "s.json", given)
    assert checked(tmp_path / "s.json", given, exported=True)
    assert checked(tmp_path / "s.json", given, actions=False) == published()  # nothing of the video is normalised


@pytest.mark.parametrize(
    ("state", "given", "match"),
    [
        ({"default": entry(2), "observation.state": entry(2)}, ("data",), "group state has default, observation.state"),
        ({"left": entry(2), "right": entry(2)}, ("data",), "which of them is these weights' is unknown"),
        ({}, ("data",), "group state has nothing"),
        ({"default": entry(4)}, ("data",), "state/default is of 4 dimensions, the weights' state of 2"),
    ],
)
def test_what_is_ambiguous_or_of_another_robot_is_refused(tmp_path, state, given, match):
    write(tmp_path / "s.json", {**published(), "state": state})
    with pytest.raises(UserError, match=match) as error:
        checked(tmp_path / "s.json", given)
    assert "\n" not in str(error.value)


def test_an_export_of_several_robots_has_statistics_of_fewer_dimensions(tmp_path):
    write(tmp_path / "s.json", published(state=1))
    assert checked(tmp_path / "s.json", (), exported=True)["state"] == {"observation.state": entry(1)}
    write(tmp_path / "s.json", published(state=3))
    with pytest.raises(UserError, match="is of 3 dimensions"):
        checked(tmp_path / "s.json", (), exported=True)


def test_an_entry_that_is_named_is_taken(tmp_path):
    write(tmp_path / "s.json", {**published(), "state": {"default": entry(2), "observation.state": entry(2, 5.0)}})
    found = checked(tmp_path / "s.json", ("data", "data.window.state_key"))
    assert found["state"] == {"observation.state": entry(2, 5.0)}


@pytest.mark.parametrize("content", ["{", "[]", '{"state": {}}', '{"state": {}, "action": 3}', None])
def test_files_that_are_no_statistics_are_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    with pytest.raises(
        UserError, match=r"s\.json: .*; give the statistics of the dataset, with groups state and action"
    ):
        checked(tmp_path / "s.json", ("data",))


def test_public_names_and_own_names_are_each_others_inverse(tmp_path):
    window = SimpleNamespace(state_key="observation.state", action_key="action")
    write(tmp_path / "s.json", published())
    assert public_statistics(checked(tmp_path / "s.json", ("data",)), window) == published()
    videos = {"num_episodes": 3, "state": {}, "action": {}}
    assert public_statistics(videos, window) == videos


def test_a_policy_of_imported_weights_normalises_as_told(tmp_path, capsys):
    """The whole way: published statistics of any name in, a policy that reads them by its own names out."""
    file = save(tmp_path / "in", tiny_weights(), metadata=HEADER)
    write(tmp_path / "elsewhere" / "numbers.json", published())
    words = ["import", str(file), "--out", str(tmp_path / "base")]
    words += ["--statistics", str(tmp_path / "elsewhere" / "numbers.json")]
    assert cli.main(words) == 2
    assert "data=robotwin (z-score) or data=libero (min/max)" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()
    assert cli.main([*words, *ZSCORE]) == 0
    assert json.loads(capsys.readouterr().out)["statistics"] == "numbers.json"
    export(tmp_path / "base", tmp_path / "policy")
    action, state = normalizers(load(tmp_path / "policy"))
    assert (action.mode, state.mode) == ("zscore", "zscore")
    assert action.unnormalize(torch.tensor([[0.0, 1.0, -1.0]]))[0].tolist() == pytest.approx([1.5, 7.5, -4.5])
    export(tmp_path / "base", tmp_path / "public", form="public")
    assert json.loads((tmp_path / "public" / "dataset_stats.json").read_text()) == published()
    import_weights(tmp_path / "public" / "model.safetensors", tmp_path / "again")
    first, again = (CheckpointReader(resolve_checkpoint(tmp_path / name)) for name in ("base", "again"))
    assert json.loads(again.text("dataset_stats.json")) == json.loads(first.text("dataset_stats.json"))
    assert "normalize_action: zscore" in again.text("config.yaml")


@pytest.mark.parametrize(("name", "state", "action"), [("robotwin", 14, 14), ("libero_plus", 8, 7)])
def test_published_statistics_are_taken(shared, name, state, action):
    config = tiny_config()
    config.model.action.state_dim, config.model.action.action_dim = state, action
    file = shared / "samples" / "statistics" / f"{name}_dataset_stats.json"
    found, content = imported_statistics(file, config, ("data",), exported=False), json.loads(file.read_text())
    assert found["action"]["action"] == content["action"]["default"]
    assert public_statistics(found, config.data.window) == content


def test_published_presets_normalise_as_the_releases_do():
    for name, mode in (("robotwin", "zscore"), ("libero", "minmax")):
        data = load_config([f"data={name}"], sections=()).data
        assert (data.normalize_action, data.normalize_state) == (mode, mode)
