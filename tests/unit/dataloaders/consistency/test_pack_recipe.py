"""A repeated packing notices every input that shapes its output."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.packed_samples import folder_bytes
from support.quirky_datasets import FRONT, WINDOW, numbered, rows, samples_of, write_lines, write_v21, write_v30
from support.toy_videos import caption, mp4, write_manifest, write_tar

from dataloaders.config import BelieveConfig, ClipConfig
from dataloaders.files.video_encoder import encode_mp4
from dataloaders.packing.pack import pack
from dataloaders.shards import INDEX
from kairos_train.basics.errors import UserError

SETTINGS = {"window": WINDOW, "prompt_template": "{task}"}
ARM = {"state_key": "state.arm", "action_key": "action.arm"}


def edit_json(path: Path, change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def tasks(root: Path) -> None:
    for name, old in (("tasks", "pick"), ("episodes", '"pick"')):
        path = root / f"meta/{name}.jsonl"
        path.write_text(path.read_text().replace(old, old.replace("pick", "lift")))


def modality(root: Path) -> None:
    part = {"arm": {"start": 1, "end": 2}}
    (root / "meta/modality.json").write_text(json.dumps({"state": part, "action": part}))


def episode_table(change):
    def damage(root: Path) -> None:
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        pq.write_table(pa.Table.from_pylist(list(map(change, pq.read_table(path).to_pylist()))), path)

    return damage


def shift(row: dict) -> dict:
    names = [f"videos/{FRONT}/{end}_timestamp" for end in ("from", "to")]
    return row | {name: row[name] + (0.1 if row["episode_index"] == 2 else 0) for name in names}


CHANGES = {
    "tasks": ("v21", tasks),
    "modality": ("v21", modality),
    "info": ("v21", lambda root: edit_json(root / "meta/info.json", lambda v: v | {"robot_type": "other"})),
    "tasks of v3": (
        "v30",
        lambda root: pq.write_table(pa.table({"task_index": [0], "task": ["lift"]}), root / "meta/tasks.parquet"),
    ),
    "from_timestamp": ("v30", episode_table(shift)),
    "caption": ("v30", episode_table(lambda row: row | {"caption_long": "long"})),
}


@pytest.fixture
def sources(tmp_path) -> dict[str, Path]:
    v21 = write_v21(tmp_path / "v21", [rows(8), rows(9, 1, 8)], shown=range(9))
    part = {"arm": {"start": 0, "end": 2}}
    (v21 / "meta/modality.json").write_text(json.dumps({"state": part, "action": part}))
    return {"v21": v21, "v30": write_v30(tmp_path / "v30")}


def window_of(kind: str):
    from dataclasses import replace

    return replace(WINDOW, **ARM) if kind == "v21" else WINDOW


def early(path: Path) -> None:
    """Keep the times of files out of it."""
    for file in path.rglob("*"):
        os.utime(file, (1, 1))


@pytest.mark.parametrize("name", CHANGES)
def test_a_finished_packing_notices_a_corrected_table(sources, tmp_path, name):
    kind, change = CHANGES[name]
    settings = {"window": window_of(kind), "prompt_template": "{task}"}
    index = pack(sources[kind], tmp_path / "out", **settings)
    assert pack(sources[kind], tmp_path / "out", **settings) == index
    before = folder_bytes(tmp_path / "out")
    change(sources[kind])
    early(sources[kind])
    with pytest.raises(UserError, match="was packed from another source or with other settings"):
        pack(sources[kind], tmp_path / "out", **settings)
    assert folder_bytes(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["tasks", "modality"])
def test_a_stopped_packing_mixes_nothing_old_and_new(sources, tmp_path, name):
    kind, change = CHANGES[name]
    settings = {"window": window_of(kind), "prompt_template": "{task}"}
    video = sources[kind] / f"videos/chunk-000/{FRONT}/episode_000001.mp4"
    whole = video.read_bytes()
    video.write_bytes(whole[:300])
    with pytest.raises(UserError, match="episode_000001"):
        pack(sources[kind], tmp_path / "out", **settings)
    video.write_bytes(whole)
    change(sources[kind])
    with pytest.raises(UserError, match=r"\.packing: unfinished packing of out from another source"):
        pack(sources[kind], tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_work_without_a_finished_unit_is_in_nobodys_way(sources, tmp_path):
    root = sources["v30"]
    edit_json(root / "meta/info.json", lambda values: values | {"fps": 30})
    with pytest.raises(UserError, match="says 30 fps"):
        pack(root, tmp_path / "out", **SETTINGS)
    edit_json(root / "meta/info.json", lambda values: values | {"fps": 10})
    pack(root, tmp_path / "out", **SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "v21", "v30"]


@pytest.mark.parametrize(
    "other",
    [{"believe": BelieveConfig(fps="info")}, {"timestamp_tolerance": 1e-3}, {"captions": True}, {"seed": 1}],
)
def test_other_settings_are_noticed(sources, tmp_path, other):
    if "captions" in other:
        other = {"captions": tmp_path / "captions.jsonl"}
        other["captions"].write_text('{"episode_index": 0, "caption": "a"}\n')
    pack(sources["v30"], tmp_path / "out", **SETTINGS)
    with pytest.raises(UserError, match="from another source or with other settings"):
        pack(sources["v30"], tmp_path / "out", **SETTINGS, **other)


@pytest.mark.parametrize("later", [True, False])
@pytest.mark.parametrize("name", ["rows", "video"])
def test_a_file_that_was_written_since_is_noticed(sources, tmp_path, name, later):
    root = sources["v21"]
    pack(root, tmp_path / "out", **SETTINGS)
    if name == "rows":
        path = root / "data/chunk-000/episode_000001.parquet"
        pq.write_table(rows(9, 1, 8, task_index=pa.array([0] * 9, pa.int32())), path)
    else:
        path = root / f"videos/chunk-000/{FRONT}/episode_000001.mp4"
        encode_mp4(path, numbered(range(1, 10)), 10)
    os.utime(path, (2e9, 2e9) if later else (1, 1))  # the second: copied with its old time
    with pytest.raises(UserError, match=rf"was packed before .*{path.name} was written" if later else "of other sizes"):
        pack(root, tmp_path / "out", **SETTINGS)
    if later:
        os.utime(tmp_path / "out" / INDEX, (3e9, 3e9))


@pytest.mark.parametrize("kind", ["manifest", "tar"])
def test_clips_that_were_written_since_are_noticed(tmp_path, kind):
    folder = tmp_path / "clips"
    folder.mkdir()
    first, second = (mp4(numbered(range(n, n + 9)), fps=10) for n in (0, 9))
    if kind == "manifest":
        (folder / "a.mp4").write_bytes(first)
        write_manifest(folder, [{"path": "a.mp4", "caption": "a"}])
    else:
        write_tar(folder / "0.tar", [("a.mp4", first), ("a.json", caption("a"))])
    settings = SETTINGS | {"clips": ClipConfig(fps=10, short_side=32)}
    index = pack(folder, tmp_path / "out", **settings)
    assert pack(folder, tmp_path / "out", **settings) == index
    if kind == "manifest":
        (folder / "a.mp4").write_bytes(second)
    else:
        write_tar(folder / "0.tar", [("a.mp4", second), ("a.json", caption("a"))])
    for file in folder.iterdir():
        os.utime(file, (2e9, 2e9))
    with pytest.raises(UserError, match=r"was packed before|from another source"):
        pack(folder, tmp_path / "out", **settings)


def test_the_same_dataset_elsewhere_gives_the_same_bytes(sources, tmp_path):
    import shutil

    pack(sources["v30"], tmp_path / "one", **SETTINGS)
    shutil.copytree(sources["v30"], tmp_path / "copies/v30")
    pack(tmp_path / "copies/v30", tmp_path / "two", **SETTINGS)
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert samples_of(tmp_path / "two")[2, 0]["shows"] == [18, 19, 20, 21, 22]


def test_a_table_that_is_written_again_with_the_same_content_is_the_same(sources, tmp_path):
    root = sources["v21"]
    index = pack(root, tmp_path / "out", **SETTINGS)
    write_lines(root / "meta/tasks.jsonl", [{"task": "pick", "task_index": 0, "more": None}])
    assert pack(root, tmp_path / "out", **SETTINGS) == index
