"""LeRobot datasets -> windows in shards, against the datasets themselves."""

import json
import shutil
import tarfile

import numpy as np
import pytest
from support.packed_samples import packed_samples, psnr

from dataloaders.config import WindowConfig
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.packing.pack import pack
from dataloaders.shards import read_index, verify
from dataloaders.sources.lerobot import choose_task
from dataloaders.windows import action_count, cover, frame_indices, windows_of
from kairos_train.basics.errors import UserError

GR1, METAWORLD = "lerobot_v20_gr1", "lerobot_v30_metaworld"
WINDOWS = {
    GR1: WindowConfig(frames=5, action_video_freq_ratio=4, stride=60, height=128, width=128),
    METAWORLD: WindowConfig(frames=9, action_video_freq_ratio=2, stride=5, height=64, width=64),
}
TEMPLATE = "A robot doing: {task}"


@pytest.fixture(scope="module", params=[GR1, METAWORLD])
def packed(request, shared, tmp_path_factory):
    """(source, shard folder, window) of one of the sample datasets."""
    out = tmp_path_factory.mktemp("packed") / "shards"
    source, window = shared / "samples" / request.param, WINDOWS[request.param]
    pack(source, out, window=window, prompt_template=TEMPLATE, shard_samples=10)
    return source, out, window


def test_every_window_is_packed_once_with_the_datasets_actions_and_frames(packed):
    source, out, window = packed
    dataset, samples = LeRobotDataset(source), packed_samples(out)
    wanted = {(e.index, w.start): w for e in dataset for w in windows_of(e.length, window)}
    assert len(samples) == len(wanted) == read_index(out).samples
    episodes = {e.index: e for e in dataset}
    for i, sample in enumerate(samples):
        meta = sample.meta
        episode, w = episodes[meta["episode"]], wanted.pop((meta["episode"], meta["start"]))
        assert sample.key == f"{source.name}-{episode.index:06d}-{w.start:06d}"
        assert (meta["valid_actions"], meta["valid_frames"]) == (w.valid_actions, w.valid_frames)
        actions = episode.columns["action"][w.start : w.start + action_count(window)].astype(np.float32)
        assert np.array_equal(sample.arrays["action"][: w.valid_actions], actions)
        assert len(actions) == w.valid_actions
        assert (sample.arrays["action"][w.valid_actions :] == 0).all()
        state = episode.columns["observation.state"][w.start][None].astype(np.float32)
        assert np.array_equal(sample.arrays["state"], state)
        assert meta["text"] == meta["captions"]["instruction"] == f"A robot doing: {meta['task']}"
        assert meta["task"] in episode.tasks
        assert meta["task"] != "valid"
        assert (meta["frames"], meta["height"], meta["width"]) == (window.frames, window.height, window.width)
        if i % 5 == 0:
            raw = episode.frames(dataset.camera_keys[0], frame_indices(w.start, episode.length, window))
            assert psnr(sample.frames, cover(raw, window.height, window.width)) > 30
    assert not wanted


def test_packing_gives_the_same_bytes_again_for_any_number_of_processes(packed, tmp_path):
    source, out, window = packed
    again = pack(source, tmp_path / "again", window=window, prompt_template=TEMPLATE, shard_samples=10, processes=2)
    assert again == json.loads((out / "index.json").read_text())
    for name in ("index.json", "dataset_stats.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()
    assert verify(tmp_path / "again") == []


def test_long_episodes_read_in_chunks_give_the_same_bytes(packed, tmp_path, monkeypatch):
    source, out, window = packed
    monkeypatch.setattr("dataloaders.sources.lerobot.FRAME_CHUNK", 17)
    pack(source, tmp_path / "again", window=window, prompt_template=TEMPLATE, shard_samples=10)
    assert read_index(tmp_path / "again").shards == read_index(out).shards


def test_shards_mix_episodes_and_differ_by_one_sample_at_most(packed):
    _, out, _ = packed
    counts = [s.samples for s in read_index(out).shards]
    assert max(counts) <= 10
    assert max(counts) - min(counts) <= 1
    for shard in read_index(out).shards:
        with tarfile.open(out / shard.name) as tar:
            assert len({name.split("-")[-2] for name in tar.getnames()}) > 1
            assert all((m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644) for m in tar)


def test_index_and_statistics_describe_the_dataset(packed):
    source, out, window = packed
    index, dataset = read_index(out), LeRobotDataset(source)
    frames = sum(e.length for e in dataset)
    assert index.window == window
    assert index.fps == dataset.fps == 20
    assert index.encoders is None
    assert index.source["episodes"] == dataset.num_episodes
    assert index.source["frames"] == index.statistics()["num_transition"] == frames
    assert index.source["cameras"] == dataset.camera_keys
    states = np.concatenate([e.columns["observation.state"] for e in dataset]).astype(np.float32)
    assert index.state_dim == states.shape[1]
    assert index.statistics()["state"]["observation.state"]["global_max"] == states.max(0).tolist()
    assert len(index.statistics()["action"]["action"]["stepwise_mean"]) == action_count(window)
    assert [p for p in out.parent.iterdir() if p.name.startswith(".")] == []


def test_cameras_stand_side_by_side_in_the_order_asked_for(shared, tmp_path):
    source = tmp_path / "two"
    shutil.copytree(shared / "samples" / METAWORLD, source)
    _duplicate_camera(source, "observation.images.top", "observation.images.again")
    window = WindowConfig(frames=5, stride=50, height=64, width=32)
    for cameras, name in (([], "all"), (["observation.images.top", "observation.images.again"], "chosen")):
        window.cameras = cameras
        index = pack(source, tmp_path / name, window=window, prompt_template="{task}")
        assert index["source"]["cameras"] == (cameras or sorted(LeRobotDataset(source).camera_keys))
        frames = np.stack([sample.frames for sample in packed_samples(tmp_path / name)])
        assert frames.shape[2:] == (64, 64, 3)
        assert psnr(frames[..., :32, :], frames[..., 32:, :]) > 30
    window.cameras = ["observation.images.wrist"]
    with pytest.raises(UserError, match=r"'observation\.images\.wrist' has no files; this dataset has observation"):
        pack(source, tmp_path / "none", window=window, prompt_template="{task}")


def _duplicate_camera(root, old, new):
    """Give a v3.0 dataset a second camera with the same pictures."""
    import pyarrow.parquet as pq

    shutil.copytree(root / "videos" / old, root / "videos" / new)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][new] = info["features"][old]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    for column in table.column_names:
        if column.startswith(f"videos/{old}/"):
            table = table.append_column(column.replace(old, new), table[column])
    pq.write_table(table, path)


def _edit_data(root, change):
    """Rewrite the frame table of the v3.0 sample: `change` maps {column: list} to the same."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    schema = table.schema
    columns = table.to_pydict()
    change(columns)
    pq.write_table(pa.table(columns, schema=schema), path)


def test_nan_action_is_named_and_packing_goes_on_once_it_is_mended(shared, tmp_path):
    source = tmp_path / "nan"
    shutil.copytree(shared / "samples" / METAWORLD, source)

    def spoil(columns):
        columns["action"][57] = [0.0, float("nan"), 0.0, 0.0]  # the first episode has 49 frames

    _edit_data(source, spoil)
    with pytest.raises(UserError, match="episode 1: column 'action' is nan at frame 8, dimension 1"):
        pack(source, tmp_path / "out", window=WINDOWS[METAWORLD], prompt_template="{task}")
    with pytest.raises(UserError, match="episode 1: column 'action' is nan"):
        pack(source, tmp_path / "out", window=WINDOWS[METAWORLD], prompt_template="{task}", processes=2)
    assert not (tmp_path / "out").exists()
    shutil.copytree(shared / "samples" / METAWORLD, source, dirs_exist_ok=True)
    index = pack(source, tmp_path / "out", window=WINDOWS[METAWORLD], prompt_template="{task}")
    again = pack(
        shared / "samples" / METAWORLD, tmp_path / "fresh", window=WINDOWS[METAWORLD], prompt_template="{task}"
    )
    assert [s["samples"] for s in index["shards"]] == [s["samples"] for s in again["shards"]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fresh", "nan", "out"]  # the work folder is gone


def test_mistaken_settings_are_named(shared, tmp_path):
    source = shared / "samples" / METAWORLD

    def attempt(match, *, template="{task}", out=tmp_path / "out", window=None, **settings):
        with pytest.raises(UserError, match=match):
            pack(source, out, window=WindowConfig(**(window or {})), prompt_template=template, **settings)
        assert not (tmp_path / "out").exists()

    attempt(r"data\.window\.state_key='pose'.*observation\.state", window={"state_key": "pose"})
    attempt(r"data\.window\.action_key='moves'.*has action", window={"action_key": "moves"})
    attempt("frames=8: must be 4k", window={"frames": 8})
    attempt(r"must contain \{task\}", template="do it")
    attempt("exists", out=tmp_path)
    attempt("shard_samples=0", shard_samples=0)
    attempt("processes=0", processes=0)
    attempt("on_bad='ignore'", on_bad="ignore")
    attempt("is for LeRobot|cannot be read", captions=tmp_path / "none.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_instruction_is_the_task_that_is_not_the_validity_note():
    assert choose_task(["valid", "pick the pear"]) == "pick the pear"
    assert choose_task(["open the drawer", "valid"]) == "open the drawer"
    assert choose_task(["valid", ""]) is None
