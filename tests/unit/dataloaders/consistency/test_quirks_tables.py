"""Tables, texts and files of datasets that others wrote: read, or refused by their cause."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.quirky_datasets import FRONT, WINDOW, numbered, rows, samples_of, write_lines, write_v21, write_v30
from support.terminal import on_a_terminal
from support.toy_videos import jpg, mp4, write_manifest, write_tar

from dataloaders.config import BelieveConfig, ClipConfig, DataConfig
from dataloaders.consistency.report import read_report
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.packing.dataset_check import check_dataset
from dataloaders.packing.pack import pack
from dataloaders.shards import read_index
from kairos_train import cli
from kairos_train.basics.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
PICK_OPEN = ({"task_index": 0, "task": "pick"}, {"task_index": 1, "task": "open"})


def packed(root: Path, **believe: str) -> dict:
    """The samples of a dataset by (episode, start)."""
    out = root.with_name(f"{root.name}_shards")
    pack(root, out, window=WINDOW, prompt_template="{task}", believe=BelieveConfig(**believe))
    return samples_of(out)


def refused(root: Path, match: str, **believe: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        packed(root, **believe)
    assert "\n" not in str(caught.value)


def named(root: Path) -> dict[str, str]:
    return {
        entry["name"]: entry["believed"]
        for entry in read_report(root.with_name(f"{root.name}_shards"))["contradictions"]
    }


def rewrite(path: Path, change) -> None:
    """Change a parquet file's rows, a list of dictionaries."""
    pq.write_table(pa.Table.from_pylist(change(pq.read_table(path).to_pylist())), path)


# ---- promised episodes


def test_a_table_of_episodes_that_was_cut_is_refused_until_it_is_believed(tmp_path):
    new = write_v30(tmp_path / "v30")
    rewrite(new / "meta/episodes/chunk-000/file-000.parquet", lambda table: table[:1])
    old = write_v21(tmp_path / "v21", [rows(8, e, 8 * e) for e in range(3)])
    lines = (old / "meta/episodes.jsonl").read_text().splitlines(keepends=True)
    (old / "meta/episodes.jsonl").write_text(lines[0])
    for root, frames in ((new, 25), (old, 24)):
        refused(root, f"info.json promises 3 episodes and {frames} frames; the table of episodes has 1 and 8; .*=table")
        assert {episode for episode, _ in packed(root, episodes="table")} == {0}
        assert named(root)["episodes"] == "table"
    assert named(old)["unlisted"] == "the table of episodes: left out"


def test_totals_that_only_count_frames_are_reported(tmp_path):
    root = write_v21(tmp_path / "set", total_frames=7, total_tasks=3, splits={"train": "0:100"})
    packed(root)
    assert set(named(root)) == {"total_frames", "total_tasks", "splits"}


def test_a_file_that_the_table_does_not_name_is_reported(tmp_path):
    root = write_v21(tmp_path / "set")
    shutil.copy(root / "data/chunk-000/episode_000000.parquet", root / "data/chunk-000/episode_000001.parquet")
    packed(root)
    assert named(root) == {"unlisted": "the table of episodes: left out"}


@pytest.mark.parametrize(
    ("file_of", "told"),
    [
        (lambda e: [min(e, 1)], lambda e: e // 2),  # an episode behind the end of its file
        (lambda e: [0, 1] if e == 1 else [e // 2], lambda e: e // 2),  # one on both sides of it
        (lambda e: [e], lambda e: 7 if e == 1 else e),  # a file that is not there
    ],
)
def test_rows_are_found_in_the_file_that_holds_them(tmp_path, file_of, told):
    root = write_v30(tmp_path / "set", file_of=file_of, told_file=told)
    samples = packed(root)
    assert {episode for episode, _ in samples} == {0, 1, 2}
    assert samples[1, 4]["shows"] == [12, 13, 14, 15, 16]
    assert samples[1, 4]["state"][0, 0] == 4
    assert named(root) == {"data_file": "the rows, by their episode_index"}


def test_rows_that_are_nowhere_are_refused(tmp_path):
    root = write_v30(tmp_path / "set")
    rewrite(root / "data/chunk-000/file-000.parquet", lambda table: [row for row in table if row["episode_index"] != 1])
    refused(root, "holds 0 rows of episode 1, whose length is 10")


def test_a_file_of_another_episodes_rows_is_refused_until_its_name_is_believed(tmp_path):
    root = write_v21(tmp_path / "set", [rows(8), rows(8, 0)])
    refused(root, r"the file is that of episode 1; episode_index of its rows is 0; .*data\.believe\.episode_index=file")
    root = root.rename(tmp_path / "believed")
    assert {episode for episode, _ in packed(root, episode_index="file")} == {0, 1}


# ---- types of tables


def test_floats_of_merged_tables_are_whole_numbers_or_refused(tmp_path):
    def floats(row: dict) -> dict:
        return row | {k: float(v) for k, v in row.items() if k.endswith(("_index", "length")) and k != "tasks"}

    root = write_v30(tmp_path / "floats", change=floats)
    rewrite(
        root / "data/chunk-000/file-000.parquet",
        lambda table: [
            row | {k: float(row[k]) for k in ("episode_index", "frame_index", "task_index")} for row in table
        ],
    )
    pq.write_table(pa.table({"task_index": [0.0], "task": ["pick"]}), root / "meta/tasks.parquet")
    assert packed(root)[1, 2]["shows"] == [10, 11, 12, 13, 14]
    assert {key: entry for key, entry in named(root).items() if key != "shape"} == {}

    for name, value in (("length", float("nan")), (f"videos/{FRONT}/from_timestamp", float("nan")), ("length", 8.5)):
        root = write_v30(
            tmp_path / f"{name.replace('/', '_')}{value}",
            change=lambda row, name=name, value=value: (
                row | {name: value if row["episode_index"] == 1 else float(row[name])}
            ),
        )
        refused(root, rf"{name} is {value}; it must be a")
    old = write_v21(tmp_path / "old")
    text = (old / "meta/episodes.jsonl").read_text()
    (old / "meta/episodes.jsonl").write_text(text.replace('"length": 20', '"length": NaN'))
    refused(old, r"episodes\.jsonl: length is nan; it must be a whole number")


def test_columns_of_other_types_are_read(tmp_path):
    table = rows(
        20,
        timestamp=pa.array([[k / 10] for k in range(20)]),
        frame_index=pa.array(np.arange(20, dtype=np.uint8)),
        episode_index=pa.array([[0]] * 20),
        task_index=pa.array([0] * 20).dictionary_encode(),
        action=pa.array([[k, k + 1] for k in range(20)], pa.list_(pa.float16())),
    )
    sample = packed(write_v21(tmp_path / "set", [table]))[0, 6]
    assert sample["shows"] == [6, 7, 8, 9, 10]
    assert sample["action"].tolist() == [[k, k + 1] for k in range(6, 10)]


def test_shapes_and_types_that_info_does_not_have_are_reported(tmp_path):
    features = {
        "observation.state": {"dtype": "float32", "shape": [3]},
        "action": {"dtype": "int64", "shape": [2]},
        FRONT: {"dtype": "video", "shape": [48, 64, 3]},
        "observation.images.none": {"dtype": "video", "shape": [32, 32, 3]},
    }
    root = write_v21(tmp_path / "set", features=features)
    packed(root)
    found = read_report(tmp_path / "set_shards")["contradictions"]
    assert [(e["name"], e["where"], e["count"]) for e in found] == [
        ("cameras", "meta", 1),
        ("shape", "column observation.state", 2),
        ("picture_size", FRONT, 1),
    ]


def test_a_missing_score_of_a_merged_table_is_none(tmp_path):
    def change(row: dict) -> dict:
        first = row["episode_index"] == 0
        return row | {"score_good": 1.0 if first else float("nan"), "caption_long": "long" if first else None}

    samples = packed(write_v30(tmp_path / "set", change=change))
    assert samples[0, 0]["scores"] == {"good": 1.0}
    assert samples[1, 0]["scores"] == {}
    assert samples[1, 0]["captions"] == {"instruction": "pick"}


# ---- tasks


def test_an_index_of_two_tasks_is_refused(tmp_path):
    twice = [{"task_index": 0, "task": "pick"}, {"task_index": 0, "task": "open"}]
    refused(write_v21(tmp_path / "old", tasks=twice), "task_index 0 is there twice, as 'pick' and 'open'")
    new = write_v30(tmp_path / "new")
    pq.write_table(pa.table({"task_index": [0, 0], "task": ["pick", "open"]}), new / "meta/tasks.parquet")
    refused(new, "task_index 0 is there twice, as 'pick' and 'open'")
    same = write_v21(tmp_path / "same", tasks=[{"task_index": 0, "task": "pick"}] * 2)
    assert packed(same)[0, 0]["task"] == "pick"


def test_rows_of_the_empty_task_are_refused_not_given_another(tmp_path):
    halves = pa.array([0] * 10 + [1] * 10)
    tasks = [{"task_index": 0, "task": "pick"}, {"task_index": 1, "task": " "}]
    root = write_v21(tmp_path / "set", [rows(20, task_index=halves)], tasks=tasks, told=["pick", " "])
    refused(root, r"episode 0, row 10: task: the row's task_index 1 is ' '; .*data\.believe\.task=episodes$")
    refused(root, "row 10: task", task="rows")
    assert {sample["task"] for sample in packed(root, task="episodes").values()} == {"pick"}


def test_tasks_of_rows_and_of_the_table_of_episodes_must_agree(tmp_path):
    root = write_v21(tmp_path / "set", tasks=PICK_OPEN, told=["open"])
    refused(root, "row 0: task: the row's task_index 0 is 'pick'; the table of episodes has 'open'")
    for side, task in (("rows", "pick"), ("episodes", "open")):
        out = tmp_path / side
        pack(root, out, window=WINDOW, prompt_template="{task}", believe=BelieveConfig(task=side))
        assert {sample["task"] for sample in samples_of(out).values()} == {task}


@pytest.mark.parametrize("text", ["pick\u2028the cube", "pick\u0085it", "pick\x1cit", "prends la bo\u00eete", "拿"])
def test_texts_of_any_characters_are_read(tmp_path, text):
    root = write_v21(tmp_path / "set", tasks=[{"task_index": 0, "task": text}], told=[text])
    assert packed(root)[0, 0]["text"] == text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_marked_encodings_are_read(tmp_path, encoding):
    root = write_v21(tmp_path / "set", told=["bo\u00eete"])
    write_lines(root / "meta/tasks.jsonl", [{"task_index": 0, "task": "bo\u00eete"}], encoding=encoding)
    info = root / "meta/info.json"
    info.write_bytes(info.read_text().encode(encoding))
    assert packed(root)[0, 0]["task"] == "bo\u00eete"


@pytest.mark.parametrize("name", ["tasks", "episodes"])
@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_other_encodings_are_refused_by_the_name_of_the_file(tmp_path, name, encoding):
    root = write_v21(tmp_path / "set", told=["bo\u00eete"], tasks=[{"task_index": 0, "task": "bo\u00eete"}])
    path = root / f"meta/{name}.jsonl"
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    refused(root, rf"{name}\.jsonl: is not UTF-8 \(.*\); convert it")


def test_tasks_in_bytes_are_text(tmp_path):
    root = write_v30(tmp_path / "set", change=lambda row: row | {"tasks": ["bo\u00eete".encode()]})
    path = root / "meta/tasks.parquet"
    pq.write_table(pa.table({"task_index": [0], "task": pa.array(["bo\u00eete".encode()])}), path)
    assert packed(root)[0, 0]["text"] == "bo\u00eete"
    pq.write_table(pa.table({"task_index": [0], "task": pa.array(["bo\u00eete".encode("latin-1")])}), path)
    refused(root, "is not UTF-8; convert the table")


# ---- captions


def clips(folder: Path, name: str) -> Path:
    (folder / name).mkdir(parents=True)
    return folder / name


def pack_command(source: Path, out: Path, capsys, *more: str) -> list[str]:
    settings = ["data.clips.short_side=32", "data.clips.aspects=[1.0]", "data.clips.fps=10", "data.clips.most_frames=9"]
    assert cli.main(["data", "pack", str(source), "--out", str(out), "experiment=custom", *settings, *more]) == 0
    said = capsys.readouterr()
    printed = json.loads(said.out)
    noted = [line for line in said.err.splitlines() if not line.startswith("packed")]
    assert noted == [*printed["contradictions"], *(f"note: {note}" for note in printed["notes"])]
    return noted


def test_captions_are_found_or_missed_aloud(tmp_path, capsys):
    video = mp4(numbered(range(9)), fps=10)
    texts = clips(tmp_path, "texts")
    (texts / "a.mp4").write_bytes(video)
    write_manifest(texts, [{"path": "a.mp4", "text": "pick"}])
    assert pack_command(texts, tmp_path / "out1", capsys) == []
    assert read_index(tmp_path / "out1").captions == ["caption"]

    tars = clips(tmp_path, "tars")
    fields = json.dumps({"prompt": "open", "description": "a drawer"}).encode()
    write_tar(tars / "0.tar", [("0.mp4", video), ("0.json", fields), ("1.mp4", video), ("1.json", b'{"caption": "x"}')])
    said = pack_command(tars, tmp_path / "out2", capsys)
    left_out = "fields left out: description, prompt (a caption is called caption)"
    assert said[0] == f"note: 1 of 2 samples have no caption; {left_out}"
    source = read_index(tmp_path / "out2").source
    assert (source["without_caption"], source["columns_left_out"]) == (1, ["description", "prompt"])
    assert source["left_out"] == {}


def test_captions_of_episodes_that_are_not_there_are_reported(tmp_path, capsys):
    root = write_v21(tmp_path / "set")
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"episode_index": 0, "caption": "a"}\n{"episode_index": 7, "caption": "b"}\n')
    words = ["--captions", str(captions), *(f"data.window.{k}=32" for k in ("height", "width"))]
    words += ["data.window.frames=5", "data.window.action_video_freq_ratio=1"]
    said = pack_command(root, tmp_path / "out", capsys, *words)
    assert "captions: the file of captions has episode 7; the dataset has 1 others; believed: the dataset" in said[0]
    assert read_index(tmp_path / "out").captions == ["instruction", "caption"]


def test_captions_in_the_wrong_type_are_named(tmp_path):
    packed(write_v30(tmp_path / "set", change=lambda row: row | {"caption_long": 3, "score_good": "high"}))
    assert read_index(tmp_path / "set_shards").source["columns_left_out"] == ["caption_long", "score_good"]


# ---- Git LFS pointers


def pointer_at(pattern: str):
    def damage(root: Path) -> None:
        for path in root.rglob(pattern):
            path.write_bytes(POINTER)

    return damage


@pytest.mark.parametrize(
    "pattern", ["*.mp4", "episode*.parquet", "tasks.jsonl", "episodes.jsonl", "info.json", "modality.json"]
)
def test_pointers_of_a_dataset_are_named(tmp_path, pattern):
    root = write_v21(tmp_path / "set")
    (root / "meta/modality.json").write_text("{}")
    pointer_at(pattern)(root)
    refused(root, r": is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository$")


@pytest.mark.parametrize("pattern", ["tasks.parquet", "meta/episodes/*/*.parquet", "data/*/*.parquet", "*.mp4"])
def test_pointers_of_a_v3_dataset_are_named(tmp_path, pattern):
    root = write_v30(tmp_path / "set")
    pointer_at(pattern)(root)
    refused(root, "is a Git LFS pointer")


def test_pointers_among_clips_are_named(tmp_path):
    folder = clips(tmp_path, "clips")
    video = mp4(numbered(range(9)), fps=10)
    for name, data in (("a.mp4", video), ("b.mp4", POINTER), ("c.jpg", POINTER), ("d.jpg", jpg(numbered([3])[0]))):
        (folder / name).write_bytes(data)
    write_manifest(folder, [{"path": name} for name in ("a.mp4", "b.mp4", "c.jpg", "d.jpg")])
    settings = {
        "window": WINDOW,
        "prompt_template": "{task}",
        "clips": ClipConfig(fps=10, short_side=32),
        "on_bad": "skip",
    }
    index = pack(folder, tmp_path / "out", **settings)
    assert (index["samples"], index["source"]["quarantined"]) == (2, 2)
    assert (tmp_path / "out/quarantine.jsonl").read_text().count("is a Git LFS pointer") == 2

    write_tar(tmp_path / "0.tar", [("0.mp4", POINTER), ("0.txt", b"x")])
    for content in ((tmp_path / "0.tar").read_bytes(), POINTER):
        (tmp_path / "0.tar").write_bytes(content)
        with pytest.raises(UserError, match="is a Git LFS pointer"):
            pack(tmp_path / "0.tar", tmp_path / "out2", **settings | {"on_bad": "stop"})
    (folder / "manifest.jsonl").write_bytes(POINTER)
    with pytest.raises(UserError, match=r"manifest\.jsonl: is a Git LFS pointer"):
        pack(folder, tmp_path / "out3", **settings)


@pytest.mark.parametrize("name", ["index.json", "dataset_stats.json", "consistency.json", "shard-000000.tar"])
def test_pointers_among_shards_are_named(tmp_path, name, capsys):
    packed(write_v21(tmp_path / "set"))
    (tmp_path / "set_shards" / name).write_bytes(POINTER)
    code = cli.main(["data", "verify", str(tmp_path / "set_shards")])
    said = capsys.readouterr()
    assert code == (2 if name == "index.json" else 1)
    assert "is a Git LFS pointer" in said.out + said.err


# ---- data verify


def test_every_contradiction_of_a_dataset_is_listed(tmp_path, capsys, monkeypatch):
    bad = rows(12, 1, 9, timestamp=pa.array(np.float32(1.7e9 + np.arange(12) / 10)))
    root = write_v21(tmp_path / "set", [rows(9), bad, rows(12, 2, 21)], shown=range(12), total_tasks=2)
    os.truncate(root / f"videos/chunk-000/{FRONT}/episode_000002.mp4", 300)
    found = check_dataset(root, DataConfig())
    assert [(c.name, c.where, c.believed is None) for c in found.contradictions] == [
        ("total_tasks", "meta", False),
        ("frames", "episode 1", True),
        ("frames", f"episode 1, {FRONT}", True),
    ]
    assert [name for name, _ in found.faults] == ["episode 2"]
    assert (found.units, found.unresolved) == (3, 2)
    assert cli.main(["data", "verify", str(root), "--processes", "2"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert (printed["ok"], printed["unresolved"], printed["units"], len(printed["faults"])) == (False, 2, 3, 1)
    told = "episode 1: frames: timestamp is float32 near 1.7e+09"
    assert any(line.startswith(told) for line in printed["contradictions"])
    screen = on_a_terminal(monkeypatch, "data", "verify", root, code=1)
    assert screen.endswith(f"{root}: 3 contradictions, 2 of them unresolved, 1 faults in 3 units")


def test_a_clean_dataset_verifies(tmp_path, monkeypatch):
    root = write_v30(tmp_path / "set")
    screen = on_a_terminal(monkeypatch, "data", "verify", root)
    assert screen.startswith(f"{root}: ok: no contradictions in 3 units\n\nnext\n  kairos-train data pack {root} ")


def test_inspection_lists_contradictions_and_shows_the_rest(tmp_path, capsys):
    root = write_v21(tmp_path / "set", fps=30)
    assert cli.main(["data", "inspect", str(root), "--out", str(tmp_path / "page"), "data=custom"]) == 0
    said = capsys.readouterr().out
    assert "contradiction: episode 0: fps: meta/info.json says 30 fps; timestamp says 10 fps" in said
    assert "believed: neither" in said
    assert "says 30 fps" in (tmp_path / "page/index.html").read_text()


def test_settings_decide_in_the_command(tmp_path):
    root = write_v21(tmp_path / "set", fps=30)
    words = ["data", "pack", str(root), "--out", str(tmp_path / "out"), "experiment=custom"]
    words += [f"data.window.{key}=32" for key in ("height", "width")] + ["data.window.frames=5"]
    assert cli.main(words) == 2
    assert cli.main([*words, "data.believe.fps=timestamps"]) == 0
    assert read_index(tmp_path / "out").fps == 10
    assert cli.main(["data", "verify", str(tmp_path / "out")]) == 0


def test_the_official_samples_have_the_contradictions_that_are_known(shared):
    old = check_dataset(shared / "samples/lerobot_v20_gr1", DataConfig())
    assert [c.name for c in old.contradictions] == ["splits", "cameras", *["offset"] * 5]
    assert (old.unresolved, old.faults) == (0, [])
    new = check_dataset(shared / "samples/lerobot_v30_metaworld", DataConfig())
    assert (new.contradictions, new.faults) == ([], [])
    assert LeRobotDataset(shared / "samples/lerobot_v30_metaworld").contradictions == []
