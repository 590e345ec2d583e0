"""Which episodes are packed: the named ones, or those of the dataset's own split `train`."""

import json
from pathlib import Path

import pytest
from support.packed_samples import packed_samples
from support.toy_datasets import WINDOW, write_dataset

from dataloaders.config import DataConfig
from dataloaders.lerobot.splits import parse_episodes
from dataloaders.packing.inspection import inspect
from dataloaders.packing.pack import pack
from dataloaders.shards import read_index
from kairos_train.basics.errors import UserError
from kairos_train.cli import main

EPISODES = 6


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", EPISODES)


@pytest.fixture
def divided(plain, tmp_path):
    """The dataset with these splits, its files linked."""

    def write(splits) -> Path:
        root = tmp_path / "set"
        (root / "meta").mkdir(parents=True)
        for path in plain.rglob("*"):
            if path.is_file():
                (root / path.relative_to(plain)).parent.mkdir(parents=True, exist_ok=True)
                (root / path.relative_to(plain)).symlink_to(path)
        info = json.loads((plain / "meta/info.json").read_text()) | {"splits": splits}
        (root / "meta/info.json").unlink()
        (root / "meta/info.json").write_text(json.dumps(info))
        return root

    return write


def episodes_of(root: Path, out: Path, **settings) -> tuple[list[int], list[str]]:
    """(episodes packed, notes without those on dimensions)."""
    index = pack(root, out, window=WINDOW, prompt_template="{task}", **settings)
    assert index["source"]["episodes"] == len({s.meta["episode"] for s in packed_samples(out)})
    return sorted({s.meta["episode"] for s in packed_samples(out)}), index["source"]["notes"]


@pytest.mark.parametrize(
    ("splits", "packed", "note"),
    [
        ({}, [0, 1, 2, 3, 4, 5], None),
        ({"train": "0:6"}, [0, 1, 2, 3, 4, 5], None),
        ({"train": ":"}, [0, 1, 2, 3, 4, 5], None),
        ({"train": "0:4", "val": "4:6"}, [0, 1, 2, 3], "(train 0:4, val 4:6): 4 of 6 are packed, those of train"),
        ({"test": "0:2", "train": "2:"}, [2, 3, 4, 5], "4 of 6 are packed"),
        ({"train": "0:99"}, [0, 1, 2, 3, 4, 5], "the split train is 0:99, the last episode 5; it is cut there"),
        ({"train": "4:99", "val": "0:4"}, [4, 5], "the split train is 4:99"),
        ({"all": "0:6"}, [0, 1, 2, 3, 4, 5], "none is called train: all episodes are packed"),
        (None, [0, 1, 2, 3, 4, 5], None),
    ],
)
def test_the_datasets_own_split_is_packed_where_it_divides_it(divided, tmp_path, splits, packed, note):
    episodes, notes = episodes_of(divided(splits), tmp_path / "out")
    assert episodes == packed
    assert any(note in text for text in notes) if note else notes == []


@pytest.mark.parametrize(
    ("only", "packed", "note"),
    [("3-5", [3, 4, 5], None), ("5,0-1", [0, 1, 5], None), ("4-8", [4, 5], "does not have all of episodes 4 to 8")],
)
def test_named_episodes_go_before_the_datasets_split(divided, tmp_path, only, packed, note):
    root = divided({"train": "0:2", "val": "2:6"})
    episodes, notes = episodes_of(root, tmp_path / "out", only_episodes=parse_episodes(only))
    assert episodes == packed
    assert [note in text for text in notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("splits", "match"),
    [
        ({"train": "9:12"}, r"the split train \(9:12\) holds no episode; --only-episodes names some"),
        ({"train": "80%"}, r"the split train is '80%' and no range as 0:80"),
        ({"train": [0, 1]}, r"the split train is \[0, 1\] and no range"),
    ],
)
def test_a_split_that_cannot_be_packed_is_refused_unless_episodes_are_named(divided, tmp_path, splits, match):
    root = divided(splits)
    with pytest.raises(UserError, match=match):
        episodes_of(root, tmp_path / "out")
    assert episodes_of(root, tmp_path / "out", only_episodes=[(1, 2)])[0] == [1]


def test_the_command_names_episodes(divided, tmp_path, capsys):
    root = divided({"train": "0:2", "val": "2:6"})
    words = ["data", "pack", str(root), "data=custom", "data.window.frames=5", "data.window.cameras=[]"]
    words += ["data.window.action_video_freq_ratio=1", "data.window.height=32", "data.window.width=32"]
    assert main([*words, "--out", str(tmp_path / "train")]) == 0
    assert "note: meta/info.json divides the episodes" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "val"), "--only-episodes", "2-5"]) == 0
    counts = [read_index(tmp_path / name).source["episodes"] for name in ("train", "val")]
    assert counts == [2, 4]
    assert main([*words, "--out", str(tmp_path / "x"), "--only-episodes", "5-2"]) == 2
    assert "'5-2' is no episode or range of episodes; write them as 0-89" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "x"), "--only-episodes", "7"]) == 2
    assert "has none of these; its episodes are 0 to 5" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "train"), "--only-episodes", "0-1"]) == 0, "the same episodes"
    assert main([*words, "--out", str(tmp_path / "train"), "--only-episodes", "0"]) == 2
    assert "was packed from another source or with other settings" in capsys.readouterr().err
    assert any("divides the episodes" in fact for fact in inspect(root, tmp_path / "page", data=DataConfig()))
