"""LeRobot datasets: read in every version with their warts, written as the official writer does."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.lerobot_layouts import as_version_2

from dataloaders.files.video import decode_mp4
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.lerobot.writer import LeRobotWriter
from kairos_train.basics.errors import UserError

TOP = "observation.images.top"
NAMES = {"state_names": ["x", "y"], "action_names": ["dx", "dy", "grip"]}


def episode(length: int, shade: int, size: int = 32) -> dict:
    """Arguments of add_episode; the pictures' brightness rises by 3 levels a frame from `shade` on."""
    levels = (shade + 3 * np.arange(length)).astype(np.uint8)
    rng = np.random.default_rng(shade)
    return {
        "frames": {TOP: np.broadcast_to(levels[:, None, None, None], (length, size, size, 3)).copy()},
        "state": rng.normal(size=(length, 2)).astype(np.float32),
        "action": rng.normal(size=(length, 3)).astype(np.float32),
    }


def write(root: Path, lengths=(7, 5, 9), codec="h264", **extra) -> list[dict]:
    episodes = [episode(length, 40 + 50 * i) for i, length in enumerate(lengths)]
    with LeRobotWriter(root, fps=20, robot_type="toy", cameras={TOP: (32, 32)}, codec=codec, **NAMES) as writer:
        for i, arguments in enumerate(episodes):
            writer.add_episode(
                **arguments, task=("lift", "push")[i % 2], extra={k: f(i) for k, f in extra.items()} or None
            )
    return episodes


@pytest.fixture
def written(tmp_path) -> Path:
    write(tmp_path / "set")
    return tmp_path / "set"


# ---- the samples


def test_a_published_v2_set_is_read_with_all_its_warts(shared):
    dataset = LeRobotDataset(shared / "samples/lerobot_v20_gr1")
    assert (dataset.version, dataset.fps, dataset.num_episodes) == ("v2.0", 20.0, 5)
    assert dataset.camera_keys == ["observation.images.ego_view"]  # the other declared camera has no files
    assert sum(e.length for e in dataset) == 2096
    first = dataset.episode(0)
    assert first.tasks == ["pick the pear from the counter and place it in the plate", "valid"]
    assert first.columns["action"].shape == (416, 44)
    assert first.columns["action"].dtype == np.float64  # as it is stored
    assert np.array_equal(first.columns["frame_index"][:, 0], np.arange(416))  # the file has no such column
    assert first.timestamps[0] == pytest.approx(0.05, abs=1e-6)
    path = shared / "samples/lerobot_v20_gr1/videos/chunk-000/observation.images.ego_view/episode_000000.mp4"
    assert np.array_equal(first.frames(dataset.camera_keys[0], [0, 415, 3]), decode_mp4(path, indices=[0, 415, 3]))


def test_episodes_of_an_official_v3_set_find_their_part_of_the_video(shared):
    root = shared / "samples/lerobot_v30_metaworld"
    dataset = LeRobotDataset(root)
    whole = decode_mp4(root / f"videos/{TOP}/chunk-000/file-000.mp4")
    rows = pq.read_table(root / "data/chunk-000/file-000.parquet")
    first = 0
    for e in dataset:
        assert e.tasks == ["reach the red ball"]
        assert np.array_equal(e.frames(TOP, [e.length - 1, 0]), whole[[first + e.length - 1, first]])
        assert np.array_equal(
            e.columns["action"], np.array(rows["action"].to_pylist(), np.float32)[first : first + e.length]
        )
        assert e.timestamps[0] == 0
        first += e.length
    assert first == 150


# ---- the writer against the official one


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def rewritten(shared, tmp_path_factory) -> tuple[Path, Path]:
    """(the sample of the official writer, the same episodes written by ours)"""
    official = shared / "samples/lerobot_v30_metaworld"
    dataset, ours = LeRobotDataset(official), tmp_path_factory.mktemp("rewritten") / "set"
    names = {k: dataset.features[k]["names"] for k in ("observation.state", "action")}
    with LeRobotWriter(
        ours,
        fps=dataset.fps,
        robot_type=dataset.robot_type,
        cameras={TOP: (64, 64)},
        state_names=names["observation.state"],
        action_names=names["action"],
        codec="av1",
    ) as writer:
        for e in dataset:
            frames = {TOP: e.frames(TOP, range(e.length))}
            writer.add_episode(frames, e.columns["observation.state"], e.columns["action"], e.tasks[0])
    return official, ours


def test_written_set_has_the_official_files_and_info(rewritten):
    official, ours = rewritten
    assert tree(ours) == tree(official)
    assert (ours / "meta/info.json").read_text() == (official / "meta/info.json").read_text()


def test_written_tables_have_the_official_columns_types_and_values(rewritten):
    official, ours = rewritten
    for name in sorted(path for path in tree(official) if path.endswith(".parquet")):
        theirs, mine = pq.read_table(official / name), pq.read_table(ours / name)
        assert mine.schema.names == theirs.schema.names
        assert mine.schema.equals(theirs.schema), name
        assert pq.ParquetFile(ours / name).num_row_groups == pq.ParquetFile(official / name).num_row_groups
        exact = [c for c in theirs.column_names if not c.startswith("stats/")]
        assert mine.select(exact).equals(theirs.select(exact)), name


def test_written_tables_carry_the_official_notes(rewritten):
    def notes(root: Path, name: str, key: bytes, but: tuple[str, ...]) -> dict:
        note = json.loads(pq.read_schema(root / name).metadata[key])
        return {k: v for k, v in note.items() if k not in but}

    for name, key, but in (
        ("data/chunk-000/file-000.parquet", b"huggingface", ("fingerprint",)),
        ("meta/tasks.parquet", b"pandas", ("creator", "pandas_version")),
    ):
        official, ours = (notes(root, name, key, but) for root in rewritten)
        assert ours == official
    assert pq.read_schema(rewritten[1] / "meta/episodes/chunk-000/file-000.parquet").metadata is None


def test_written_statistics_have_the_official_keys_and_shapes_and_the_exact_values(rewritten):
    official, ours = (json.loads((root / "meta/stats.json").read_text()) for root in rewritten)
    assert {k: list(v) for k, v in ours.items()} == {k: list(official[k]) for k in ours}
    assert set(ours) == set(official)
    for key, block in official.items():
        for name, value in block.items():
            assert np.shape(ours[key][name]) == np.shape(value), (key, name)
            if name in ("min", "max", "mean", "std", "count") and key != TOP:
                assert ours[key][name] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, name)
    assert np.ravel(ours[TOP]["mean"]) == pytest.approx(np.ravel(official[TOP]["mean"]), abs=0.01)


# ---- the writer on its own


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_what_is_written_is_read_back(tmp_path, codec):
    episodes = write(tmp_path / "set", codec=codec)
    dataset = LeRobotDataset(tmp_path / "set")
    assert [e.tasks for e in dataset] == [["lift"], ["push"], ["lift"]]
    for e, given in zip(dataset, episodes):
        assert np.array_equal(e.columns["observation.state"], given["state"])
        assert np.array_equal(e.columns["action"], given["action"])
        assert e.timestamps == pytest.approx(np.arange(e.length) / 20, abs=1e-6)
        shown = e.frames(TOP, range(e.length)).astype(float).mean(axis=(1, 2, 3))
        assert shown == pytest.approx(given["frames"][TOP][:, 0, 0, 0], abs=1.4)


def test_quantiles_are_exact_over_all_frames(written):
    stats = json.loads((written / "meta/stats.json").read_text())
    actions = np.concatenate([e.columns["action"] for e in LeRobotDataset(written)]).astype(np.float64)
    assert stats["action"]["q10"] == pytest.approx(np.quantile(actions, 0.1, axis=0))
    levels = np.concatenate([episode(n, 40 + 50 * i)["frames"][TOP].reshape(-1) for i, n in enumerate((7, 5, 9))]) / 255
    expected = {
        "min": levels.min(),
        "max": levels.max(),
        "mean": levels.mean(),
        "std": levels.std(),
        "q50": np.median(levels),
    }
    for name, value in expected.items():
        assert np.ravel(stats[TOP][name]) == pytest.approx([value] * 3), name


def test_extra_values_of_an_episode_come_back(tmp_path):
    write(
        tmp_path / "set", seed=lambda i: 100 + i, success=lambda i: i > 0, score=lambda i: i / 2, who=lambda i: f"p{i}"
    )
    last = LeRobotDataset(tmp_path / "set").episode(2)
    assert last.extra == {"seed": 102, "success": True, "score": 1.0, "who": "p2"}
    assert last.columns["seed"].tolist() == [[102]] * 9
    assert "who" not in last.columns


def test_files_are_split_at_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr("dataloaders.lerobot.writer._MB", 1)  # 100 and 200 bytes
    episodes = write(tmp_path / "set")
    assert len(list((tmp_path / "set").rglob("*.mp4"))) > 1
    assert len(list((tmp_path / "set/data").rglob("*.parquet"))) == 3
    for e, given in zip(LeRobotDataset(tmp_path / "set"), episodes):
        assert np.array_equal(e.columns["action"], given["action"])
        assert e.frames(TOP, [e.length - 1]).mean() == pytest.approx(given["frames"][TOP][-1].mean(), abs=1.4)


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def crash() -> None:
        with LeRobotWriter(tmp_path / "set", fps=20, robot_type="toy", cameras={TOP: (32, 32)}, **NAMES) as writer:
            writer.add_episode(**episode(5, 40), task="lift")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        crash()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_overwritten(written):
    with pytest.raises(UserError, match="exists"):
        LeRobotWriter(written, fps=20, robot_type="toy", cameras={}, **NAMES)


def test_a_set_without_episodes_is_refused(tmp_path):
    writer = LeRobotWriter(tmp_path / "set", fps=20, robot_type="toy", cameras={TOP: (32, 32)}, **NAMES)
    with pytest.raises(UserError, match="no episode"), writer:
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.zeros((5, 3))}, "observation.state is"),
        ({"action": np.full((5, 3), np.nan)}, "not finite"),
        ({"frames": {TOP: np.zeros((5, 32, 30, 3), np.uint8)}}, "must be uint8"),
        ({"frames": {}}, "has cameras"),
        ({"task": " "}, "needs an instruction"),
        ({"extra": {"seed": 1}}, "every episode needs the first one's names"),
    ],
)
def test_an_episode_that_does_not_fit_is_refused(tmp_path, change, message):
    with LeRobotWriter(tmp_path / "set", fps=20, robot_type="toy", cameras={TOP: (32, 32)}, **NAMES) as writer:
        writer.add_episode(**episode(5, 40), task="lift")
        with pytest.raises(UserError, match=message):
            writer.add_episode(**{**episode(5, 40), "task": "lift", **change})
        writer.add_episode(**episode(4, 90), task="lift")
    assert [e.length for e in LeRobotDataset(tmp_path / "set")] == [5, 4]  # nothing of the refused one went in


# ---- the reader's traps


@pytest.mark.parametrize("version", ["v2.0", "v2.1"])
def test_older_layouts_give_the_same_episodes(written, tmp_path, version):
    old, new = LeRobotDataset(as_version_2(written, tmp_path / "old", version)), LeRobotDataset(written)
    assert old.version == version
    assert old.camera_keys == [TOP]
    for a, b in zip(old, new, strict=True):
        assert (a.index, a.length, a.tasks) == (b.index, b.length, b.tasks)
        assert np.array_equal(a.columns["action"], b.columns["action"])
        assert np.abs(a.frames(TOP, [a.length - 1]) - b.frames(TOP, [b.length - 1]).astype(int)).max() <= 3


def test_the_task_of_the_frames_comes_first(written, tmp_path):
    root = as_version_2(written, tmp_path / "old", "v2.1")
    lines = [json.dumps({"episode_index": i, "tasks": ["push", "lift"], "length": n}) for i, n in enumerate((7, 5, 9))]
    (root / "meta/episodes.jsonl").write_text("\n".join(reversed(lines)))
    assert [e.tasks for e in LeRobotDataset(root)] == [["lift", "push"], ["push", "lift"], ["lift", "push"]]


def test_the_task_column_may_be_called_task(written):
    path = written / "meta/tasks.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["task_index", "task"]), path)
    assert LeRobotDataset(written).episode(1).tasks == ["push"]


def test_timestamps_that_do_not_match_the_video_are_an_error(written):
    path = written / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    wrong = pa.array(table["timestamp"].to_numpy() * 1.01, pa.float32())
    pq.write_table(table.set_column(table.schema.get_field_index("timestamp"), "timestamp", wrong), path)
    LeRobotDataset(written, tolerance=1e-3).episode(1)
    with pytest.raises(UserError, match="tolerance"):
        LeRobotDataset(written).episode(1)
    e = LeRobotDataset(written, tolerance=1e-3).episode(1)
    with pytest.raises(UserError, match="tolerance"):
        e.frames(TOP, [0])


def test_inline_images_are_read(tmp_path, written):
    from PIL import Image

    root = as_version_2(written, tmp_path / "old", "v2.1")
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.inline"] = {"dtype": "image", "shape": [4, 6, 3]}
    (root / "meta/info.json").write_text(json.dumps(info))
    pictures = np.random.default_rng(0).integers(0, 256, (9, 4, 6, 3), np.uint8)
    for path in sorted(root.rglob("*.parquet")):
        table = pq.read_table(path)
        cells = []
        for i in range(table.num_rows):
            file = io.BytesIO()
            Image.fromarray(pictures[i]).save(file, format="PNG")
            cells.append({"bytes": file.getvalue(), "path": None})
        pq.write_table(table.append_column("observation.images.inline", pa.array(cells)), path)
    dataset = LeRobotDataset(root)
    assert dataset.camera_keys == ["observation.images.inline", TOP]
    assert np.array_equal(dataset.episode(0).frames("observation.images.inline", [5, 2]), pictures[[5, 2]])


def test_a_camera_without_pictures_and_rows_outside_are_errors(written):
    e = LeRobotDataset(written).episode(0)
    with pytest.raises(UserError, match=f"wrist.*{TOP}"):
        e.frames("observation.images.wrist", [0])
    with pytest.raises(IndexError):
        e.frames(TOP, [-1])


def edit_info(root: Path, **changes) -> None:
    path = root / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_row(root: Path) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def lose_action_of_a_row(root: Path) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    values = table["action"].to_pylist()
    values[2] = None
    column = pa.array(values, table["action"].type)
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", column), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: os.remove(r / "meta/info.json"), "info.json is missing"),
        (lambda r: (r / "meta/info.json").write_text("{"), "not JSON"),
        (lambda r: edit_info(r, codebase_version="v1.6"), "v1.6.*v2.0, v2.1, v3.0"),
        (lambda r: edit_info(r, fps=0), "fps is 0"),
        (lambda r: edit_info(r, data_path="data/{nothing}.parquet"), "data_path.*cannot be filled in"),
        (lambda r: os.remove(r / "meta/tasks.parquet"), r"tasks\.parquet: the file is missing"),
        (lambda r: shutil.rmtree(r / "meta/episodes"), "episodes: holds no parquet"),
        (lambda r: os.remove(r / "data/chunk-000/file-000.parquet"), "file-000.parquet: the file is missing"),
        (lambda r: (r / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1"), "not a readable parquet"),
        (drop_row, "holds 6 rows of episode 0, whose length is 7"),
        (lose_action_of_a_row, "'action' has rows without a value"),
    ],
)
def test_malformed_sets_are_named_in_one_line(written, damage, message):
    damage(written)
    with pytest.raises(UserError, match=message) as caught:
        LeRobotDataset(written).episode(0)
    assert "\n" not in str(caught.value)


def test_a_missing_video_of_one_episode_is_named(written, tmp_path):
    root = as_version_2(written, tmp_path / "old", "v2.1")
    os.remove(root / f"videos/chunk-000/{TOP}/episode_000001.mp4")
    dataset = LeRobotDataset(root)
    assert dataset.camera_keys == [TOP]
    with pytest.raises(UserError, match=r"episode_000001\.mp4: no such"):
        dataset.episode(1).frames(TOP, [0])
