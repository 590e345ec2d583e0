"""Names and order of cameras: the same from packing to serving, or refused with both orders."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from support.quirky_datasets import FRONT, WRIST, codes_in, write_v21
from support.tiny_export import random_weights, tiny_config

from dataloaders.config import SourceConfig, WindowConfig
from dataloaders.consistency.report import CONSISTENCY, announced
from dataloaders.files.video import decode_mp4
from dataloaders.packing.pack import pack
from dataloaders.packing.verification import verify
from dataloaders.shards import INDEX, read_index, read_shard
from evaluation.held_out import open_shards
from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.conditioning.build import build_encoders
from kairos_train.config.compose import to_yaml
from kairos_train.config.schema import Config
from kairos_train.inference.load import load
from kairos_train.serving.policy import ServedPolicy
from kairos_train.training.build_run import _check_data
from kairos_train.training.inputs.feed import Feed
from kairos_train.weights.export import export

SETS = {"A": [FRONT, WRIST], "B": [WRIST, FRONT], "C": [FRONT], "D": ["observation.images.left", FRONT]}
ORDERS = r"\[observation\.images\.front,observation\.images\.wrist\]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Shards of one dataset with the cameras of SETS."""
    folder = tmp_path_factory.mktemp("cameras")
    write_v21(folder / "set", cameras=(FRONT, WRIST))
    write_v21(folder / "other", cameras=("observation.images.left", FRONT))
    for name, cameras in SETS.items():
        source = folder / ("other" if name == "D" else "set")
        pack(source, folder / name, window=window_of(cameras), prompt_template="{task}")
    return {name: folder / name for name in SETS}


def window_of(cameras: list[str]) -> WindowConfig:
    return WindowConfig(frames=5, action_video_freq_ratio=1, height=32, width=32, cameras=cameras)


def config_of(cameras: list[str], **data) -> Config:
    config = tiny_config()
    action = dataclasses.replace(config.model.action, action_dim=2, state_dim=2)
    data = dataclasses.replace(config.data, window=window_of(cameras), **data)
    return dataclasses.replace(config, data=data, model=dataclasses.replace(config.model, action=action))


def check(config: Config, *folders: Path) -> list[str]:
    """What a run of these sources is told; UserError where they do not fit."""
    config.data.sources = [SourceConfig(shards=str(folder)) for folder in folders]
    config.train.micro_batch = 1  # of several shapes
    return _check_data(config, [read_index(folder) for folder in folders])


def robot_of(config: Config, folder: Path) -> dict:
    sections = {"data": config.data, "encoders": config.encoders, "model": config.model, "stage": config.stage}
    return Feed([read_index(folder)], torch.device("cpu"), seed=0, **sections).robot


def test_cameras_stand_in_their_order(folders):
    for name, order in (("A", [0, 1]), ("B", [1, 0])):
        index = read_index(folders[name])
        raw = next(read_shard(index.folder, index.shards[0]))
        picture = decode_mp4(raw["mp4"])
        start = json.loads(raw["json"])["start"]
        assert [codes_in(half)[0] for half in (picture[:, :, :32], picture[:, :, 32:])] == [
            start + 64 * c for c in order
        ]


@pytest.mark.parametrize("cameras", [[FRONT, FRONT], [FRONT, WRIST, FRONT]])
def test_a_camera_twice_is_refused_when_it_is_packed(tmp_path, cameras):
    root = write_v21(tmp_path / "set", cameras=(FRONT, WRIST))
    with pytest.raises(UserError, match=f"names {FRONT} twice"):
        pack(root, tmp_path / "out", window=window_of(cameras), prompt_template="{task}")


def test_two_cameras_of_one_file_are_one_camera(tmp_path):
    path = f"videos/chunk-{{episode_chunk:03d}}/{FRONT}/episode_{{episode_index:06d}}.mp4"
    root = write_v21(tmp_path / "set", cameras=(FRONT, WRIST), video_path=path)
    with pytest.raises(UserError, match=rf"cameras {FRONT} and {WRIST} are the same file"):
        pack(root, tmp_path / "out", window=window_of([FRONT, WRIST]), prompt_template="{task}")
    pack(root, tmp_path / "out", window=window_of([FRONT]), prompt_template="{task}")


@pytest.mark.parametrize("cameras", [[WRIST, FRONT], [FRONT], [FRONT, "observation.images.none"]])
def test_training_with_other_cameras_than_the_shards_is_refused(folders, cameras):
    check(config_of([FRONT, WRIST]), folders["A"])
    check(config_of([]), folders["A"])
    with pytest.raises(UserError, match=r"^data\.window\.cameras=\[.*\]: .*A was packed with " + ORDERS):
        check(config_of(cameras), folders["A"])


def test_a_mixture_of_two_orders_is_refused(folders):
    check(config_of([]), folders["A"], folders["C"])
    check(config_of([]), folders["A"], folders["D"])  # another robot
    with pytest.raises(UserError, match=rf"A was packed with the cameras {ORDERS}, .*B with "):
        check(config_of([]), folders["A"], folders["C"], folders["B"])


def test_validation_on_another_order_than_every_camera_in_name_order_is_refused(folders, tmp_path):
    pack(folders["A"].parent / "set", tmp_path / "every", window=window_of([]), prompt_template="{task}")
    assert check(config_of([], validation_shards=str(folders["A"])), tmp_path / "every") == []
    with pytest.raises(UserError, match=rf"every was packed with the cameras {ORDERS}, .*B with "):
        check(config_of([], validation_shards=str(folders["B"])), tmp_path / "every")


@pytest.mark.parametrize("name", ["B", "C", "D"])
def test_validation_on_other_cameras_is_refused(folders, name):
    for cameras in ([], SETS["A"]):
        config = config_of(cameras, shards=str(folders["A"]), validation_shards=str(folders["A"]))
        assert check(config, folders["A"]) == []
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, validation_shards=str(folders[name]))
        )
        with pytest.raises(UserError, match=r"was packed with"):
            check(config, folders["A"])


def exported(folder: Path, config: Config, shards: Path, robot: dict) -> Path:
    checkpoint = write_checkpoint(
        folder / "run",
        1,
        sections={"model": random_weights(config)},
        state={"encoders": build_encoders(config.encoders).identity, "robot": robot},
        files={"config.yaml": to_yaml(config), "dataset_stats.json": (shards / "dataset_stats.json").read_text()},
    )
    export(checkpoint, folder / "out", weights="raw", dtype="fp32")
    return folder / "out"


@pytest.mark.parametrize("cameras", [[], SETS["A"]])
def test_evaluation_on_other_cameras_is_refused(folders, tmp_path, cameras):
    robot = robot_of(config_of(cameras), folders["A"])
    policy = load(exported(tmp_path, config_of(cameras), folders["A"], robot))
    assert policy.cameras == (FRONT, WRIST)
    open_shards(folders["A"], policy)
    with pytest.raises(UserError, match=f"B: cameras are {WRIST},{FRONT}, the model was trained with {FRONT},{WRIST}"):
        open_shards(folders["B"], policy)


def test_an_export_that_names_two_orders_is_refused(folders, tmp_path):
    folder = exported(tmp_path, config_of(SETS["B"]), folders["A"], {"fps": 10.0, "cameras": SETS["A"]})
    for use in (load, ServedPolicy):
        with pytest.raises(
            UserError, match=f"robot.cameras is {FRONT},{WRIST}, run.data.window.cameras {WRIST},{FRONT}"
        ):
            use(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: v["window"] | {"cameras": SETS["B"]}, f"window.cameras is {WRIST}, {FRONT}, source.cameras {FRONT}"),
        (lambda v: v["window"] | {"width": 64}, "has pictures of 32×64; its 2 cameras give 32×128"),
    ],
)
def test_an_index_that_contradicts_itself_is_found(folders, tmp_path, change, reason):
    import shutil

    folder = Path(shutil.copytree(folders["A"], tmp_path / "A"))
    assert verify(folder).faults == []
    values = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(values | {"window": change(values)}))
    assert any(fault.name == INDEX and reason in fault.reason for fault in verify(folder).faults)


# ---- what is said of a dataset's contradictions


@pytest.fixture
def trimmed(tmp_path) -> Path:
    write_v21(tmp_path / "set", total_tasks=3)
    pack(tmp_path / "set", tmp_path / "shards", window=window_of([FRONT]), prompt_template="{task}")
    return tmp_path / "shards"


def test_training_evaluation_and_serving_say_what_was_resolved(trimmed, tmp_path, caplog):
    config = config_of([FRONT], shards=str(trimmed))
    (line,) = check(config, trimmed)
    assert line.startswith(f"{trimmed}: its dataset contradicts itself: meta: total_tasks: meta/info.json says 3 tasks")
    robot = robot_of(config, trimmed)
    assert robot["contradictions"] == ["total_tasks"]
    served = ServedPolicy(exported(tmp_path, config, trimmed, robot), steps=1)
    assert served.contradictions == ["total_tasks"]
    assert verify(trimmed).notes == [line.removeprefix(f"{trimmed}: its dataset contradicts itself: ")]
    with caplog.at_level(logging.INFO):
        assert verify(trimmed).faults == []


def test_what_is_not_resolved_is_refused(trimmed):
    path = trimmed / CONSISTENCY
    found = json.loads(path.read_text())
    found["contradictions"][0]["believed"], found["unresolved"] = None, 1
    path.write_text(json.dumps(found))
    config = config_of([FRONT], shards=str(trimmed))
    with pytest.raises(UserError, match=r"its dataset contradicts itself: meta: total_tasks: .* pack again"):
        check(config, trimmed)
    assert [fault.name for fault in verify(trimmed).faults] == [CONSISTENCY]


@pytest.mark.parametrize("content", ["{}", "[1]", '{"format": "kairos-consistency-1"}', "no JSON"])
def test_a_damaged_report_is_refused(trimmed, content):
    (trimmed / CONSISTENCY).write_text(content)
    with pytest.raises(UserError, match=rf"{CONSISTENCY}: .*pack again"):
        announced(trimmed)
    assert [fault.name for fault in verify(trimmed).faults] == [CONSISTENCY]


def test_a_report_that_is_gone_is_missed(trimmed):
    (trimmed / CONSISTENCY).unlink()
    assert announced(trimmed) == []
    assert [(fault.name, fault.reason) for fault in verify(trimmed).faults] == [(CONSISTENCY, "is missing")]
