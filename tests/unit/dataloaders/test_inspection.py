"""`data inspect`: what it says is what is there, and its pictures show it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from support.terminal import on_a_terminal
from support.toy_datasets import CAMERA, WINDOW, write_dataset
from support.toy_videos import counting, mp4, write_manifest

from dataloaders.config import ClipConfig, DataConfig
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.lerobot.writer import LeRobotWriter
from dataloaders.packing.inspection import FRAMES, inspect
from dataloaders.packing.pack import pack
from dataloaders.shards import read_index
from kairos_train import cli
from kairos_train.basics.errors import UserError

DATA = DataConfig(window=WINDOW, clips=ClipConfig(fps=10.0, short_side=64, most_frames=9))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(
        tmp_path_factory.mktemp("data") / "set", 4, caption_detailed=lambda i: "<b>much</b> to say", score_good=float
    )


def facts_of(lines: list[str]) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in lines)


def brightest(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_lerobot_dataset_is_counted_exactly(dataset, tmp_path):
    facts = facts_of(inspect(dataset, tmp_path / "page", data=DATA, samples=3))
    episodes = list(LeRobotDataset(dataset))
    frames = sum(e.length for e in episodes)
    assert facts["length"] == f"4 episodes, {frames} frames at 10 fps, {frames / 36000:.3f} h"
    assert facts["episodes"] == "14 to 17 frames, median 15"
    assert facts["camera"] == "observation.images.top, 32×32"
    actions = np.concatenate([e.columns["action"] for e in episodes])
    assert facts["action"] == f"2 dimensions from {actions.min():.4g} to {actions.max():.4g}, 0 never move"
    report = json.loads((tmp_path / "page/report.json").read_text())
    assert {v["name"]: v["high"] for v in report["vectors"]}["action"] == actions.max(0).tolist()
    names = {"index.html", "report.json", "contact_sheet.png", "actions.png", "states.png"}
    assert {p.name for p in (tmp_path / "page").iterdir()} == names


def test_shards_are_counted_and_their_samples_shown(dataset, tmp_path):
    pack(dataset, tmp_path / "shards", window=WINDOW, prompt_template="{task}", shard_samples=7)
    facts = facts_of(inspect(tmp_path / "shards", tmp_path / "page", data=DataConfig(), samples=5))
    index = read_index(tmp_path / "shards")
    assert facts["samples"].startswith(f"{index.samples} in {len(index.shards)} shards, ")
    assert facts["sizes"] == "5 frames of 32×32"
    assert facts["score good"] == f"0 to 3, median 2 in {index.samples} of {index.samples} samples"
    assert facts["captions"].startswith(f"detailed ({index.samples}), instruction ({index.samples}) in ")
    assert facts["action"].endswith("0 never move")
    page = (tmp_path / "page/index.html").read_text()
    assert "<b>much" not in page
    for name in ("contact_sheet.png", "actions.png", "states.png"):
        assert f'src="{name}"' in page
    sheet = brightest(tmp_path / "page/contact_sheet.png")
    tall = (sheet.std(axis=(1, 2)) > 20).sum()
    assert tall > 5 * 96, "five rows of pictures"
    assert sheet.shape[1] > FRAMES // 2 * 96


def test_a_dimension_that_never_moves_is_said(shared, tmp_path):
    lines = inspect(shared / "samples/lerobot_v20_gr1", tmp_path / "page", data=DataConfig())
    assert facts_of(lines)["action"] == "44 dimensions from -3 to 3, 25 never move"
    assert facts_of(lines)["without files"] == "observation.images.egoview"
    assert (
        "note: action: 25 of 44 dimensions never move (7 to 21, 34 to 43); "
        "data.window.action_key='action[0:7]+action[22:34]' leaves them out"
    ) in lines


def test_what_never_moves_is_left_out_by_the_key_that_packing_tells(tmp_path, capsys):
    moves, still = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32), np.full((12, 3), 0.5, np.float32)
    names = [f"j{i}" for i in range(5)]
    with LeRobotWriter(
        tmp_path / "set", fps=10, robot_type="a", cameras={CAMERA: (32, 32)}, state_names=names, action_names=names
    ) as writer:
        vectors = np.concatenate([moves[:, :1], still[:, :1], moves[:, 1:], still[:, 1:]], axis=1)
        writer.add_episode({CAMERA: np.zeros((12, 32, 32, 3), np.uint8)}, vectors, vectors, "stay")
    words = ["data", "pack", str(tmp_path / "set"), "data=custom", "data.window.frames=5", "data.window.cameras=[]"]
    assert cli.main([*words, "--out", str(tmp_path / "all")]) == 0
    told = "never move (1, 3 to 4); data.window.{0}_key='{1}[0:1]+{1}[2:3]' leaves them out"
    notes = [
        f"action: 3 of 5 dimensions {told.format('action', 'action')}",
        f"state: 3 of 5 dimensions {told.format('state', 'observation.state')}",
    ]
    assert read_index(tmp_path / "all").source["notes"] == notes
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")] == [
        f"note: {note}" for note in notes
    ]
    window = replace(WINDOW, action_key="action[0:1]+action[2:3]", state_key="observation.state[0:1]")
    index = pack(tmp_path / "set", tmp_path / "some", window=window, prompt_template="{task}")
    assert (index["action_dim"], index["state_dim"], index["source"]["notes"]) == (2, 1, [])
    relative = replace(WINDOW, action_values="minus_state", absolute_dims=[4])
    index = pack(tmp_path / "set", tmp_path / "relative", window=relative, prompt_template="{task}")
    assert index["source"]["notes"][1].endswith(
        "leave the same ones out of data.window.action_key and state_key, as observation.state[0:1]+"
        "observation.state[2:3]"
    )


def test_videos_of_a_manifest_are_looked_at_with_what_cannot_be_used(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.mp4").write_bytes(mp4(counting(30)))
    rows = [{"path": f"{i}.mp4", "caption": f"<video {i}>"} for i in range(4)]
    facts = facts_of(inspect(write_manifest(tmp_path, rows), tmp_path / "page", data=DATA))
    assert facts["samples"] == "6 in 1 of 1 units, 0.001 h at up to 10 fps"
    assert facts["cannot be used"] == "1 in 1 of 1 units"
    assert facts["sizes"] == "2, most often 9 frames of 64×64 (3)"
    assert "3.mp4" in (tmp_path / "page/index.html").read_text()


def test_the_command_prints_the_facts_and_where_the_page_is(dataset, tmp_path, capsys, monkeypatch):
    words = ["data", "inspect", str(dataset), "--out", str(tmp_path / "page"), "data=custom", "--samples", "2"]
    screen = on_a_terminal(monkeypatch, *words)
    assert "length: 4 episodes" in screen
    assert f"where to look\n  page  {tmp_path / 'page/index.html'}\n\nnext\n  kairos-train data verify " in screen
    assert cli.main(words) == 2
    assert "exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "match"), [("empty", "is no source"), ("none", "does not exist")])
def test_what_is_no_dataset_is_one_error_and_leaves_nothing(tmp_path, name, match):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=match):
        inspect(tmp_path / name, tmp_path / "page", data=DATA)
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
