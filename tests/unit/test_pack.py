"""LeRobot datasets -> windows in shards, against the datasets themselves."""

import json
import shutil
import tarfile

import numpy as np
import pytest

from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.loader import fixed_batches
from dataloaders.pack import choose_task, pack
from dataloaders.shards import read_index, verify
from dataloaders.windows import action_count, check_window, cover, cut_actions, frame_indices, windows_of
from kairos_train.config.schema import WindowConfig
from kairos_train.errors import UserError

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


def _batch(folder):
    return next(fixed_batches(folder, batch_size=10_000, count=1))


def _psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))


def test_every_window_is_packed_once_with_the_datasets_actions_and_frames(packed):
    source, out, window = packed
    dataset, batch = LeRobotDataset(source), _batch(out)
    wanted = {(e.index, w.start): w for e in dataset for w in windows_of(e.length, window)}
    assert len(batch.keys) == len(wanted) == read_index(out).samples
    episodes = {e.index: e for e in dataset}
    for i, meta in enumerate(batch.meta):
        episode, w = episodes[meta["episode"]], wanted.pop((meta["episode"], meta["start"]))
        assert batch.keys[i] == f"{source.name}-{episode.index:06d}-{w.start:06d}"
        assert (meta["valid_actions"], meta["valid_frames"]) == (w.valid_actions, w.valid_frames)
        actions = cut_actions(episode.columns["action"].astype(np.float32), w.start, window)
        assert np.array_equal(batch.actions[i].numpy(), actions)
        assert (actions[w.valid_actions :] == 0).all()
        assert batch.action_mask[i].sum() == w.valid_actions
        state = episode.columns["observation.state"][w.start].astype(np.float32)
        assert np.array_equal(batch.state[i, 0].numpy(), state)
        assert batch.text[i] == f"A robot doing: {meta['task']}"
        assert meta["task"] in episode.tasks
        assert meta["task"] != "valid"
        if i % 5 == 0:
            raw = episode.frames(dataset.camera_keys[0], frame_indices(w.start, episode.length, window))
            assert _psnr(batch.frames[i].numpy(), cover(raw, window.height, window.width)) > 30
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
    monkeypatch.setattr("dataloaders.pack.FRAME_CHUNK", 17)
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


def test_encodings_and_the_empty_context_are_stored(shared, tmp_path):
    seen = []

    def encode(frames, text):
        seen.append((frames.shape, text))
        return {"latents": np.full((16, 2, 4, 4), len(seen)), "context": np.full((len(seen) % 3 + 1, 6), 0.5)}

    window = WindowConfig(frames=5, stride=25, height=32, width=32)
    pack(
        shared / "samples" / METAWORLD,
        tmp_path / "out",
        window=window,
        prompt_template="{task}",
        encode=encode,
        encoders_identity={"video": {"kind": "toy"}},
        empty_context=np.ones((2, 6)),
    )
    index, batch = read_index(tmp_path / "out"), _batch(tmp_path / "out")
    assert index.encoders == {"video": {"kind": "toy"}}
    assert set(seen) == {((5, 32, 32, 3), index.tasks[0])}
    assert sorted(batch.latents[:, 0, 0, 0, 0].tolist()) == list(range(1, len(seen) + 1))
    assert batch.context_mask.sum(1).tolist() == [int(n) % 3 + 1 for n in batch.latents[:, 0, 0, 0, 0].tolist()]
    assert index.empty_context().tolist() == np.ones((2, 6)).tolist()


def test_cameras_stand_side_by_side_in_the_order_asked_for(shared, tmp_path):
    source = tmp_path / "two"
    shutil.copytree(shared / "samples" / METAWORLD, source)
    _duplicate_camera(source, "observation.images.top", "observation.images.again")
    window = WindowConfig(frames=5, stride=50, height=64, width=32)
    for cameras, name in (([], "all"), (["observation.images.top", "observation.images.again"], "chosen")):
        window.cameras = cameras
        index = pack(source, tmp_path / name, window=window, prompt_template="{task}")
        assert index["source"]["cameras"] == (cameras or sorted(LeRobotDataset(source).camera_keys))
        frames = _batch(tmp_path / name).frames
        assert frames.shape[2:] == (64, 64, 3)
        left, right = frames[..., :32, :].numpy(), frames[..., 32:, :].numpy()
        assert _psnr(left, right) > 30
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


def test_nan_action_is_named_and_nothing_is_left_behind(shared, tmp_path):
    source = tmp_path / "nan"
    shutil.copytree(shared / "samples" / METAWORLD, source)

    def spoil(columns):
        columns["action"][57] = [0.0, float("nan"), 0.0, 0.0]  # the first episode has 49 frames

    _edit_data(source, spoil)
    with pytest.raises(UserError, match="episode 1: column 'action' is nan at frame 8, dimension 1"):
        pack(source, tmp_path / "out", window=WINDOWS[METAWORLD], prompt_template="{task}")
    with pytest.raises(UserError, match="episode 1: column 'action' is nan"):
        pack(source, tmp_path / "out", window=WINDOWS[METAWORLD], prompt_template="{task}", processes=2)
    assert [p.name for p in tmp_path.iterdir()] == ["nan"]


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
    attempt("processes=2: encoding", processes=2, encode=lambda frames, text: {}, encoders_identity={})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"frames": 8}, "frames=8: must be 4k.*5 or 9"),
        ({"frames": 1}, "frames=1: .* 5$"),
        ({"height": 100}, "height=100: .*96 or 128"),
        ({"width": 16}, "width=16: .* 32$"),
        ({"stride": 0}, "stride=0"),
        ({"action_video_freq_ratio": 0}, "action_video_freq_ratio=0"),
    ],
)
def test_window_rules_name_the_nearest_legal_values(values, match):
    with pytest.raises(UserError, match=match):
        check_window(WindowConfig(**values))


@pytest.mark.parametrize("length", [1, 2, 3, 10, 41])
@pytest.mark.parametrize("stride", [1, 3])
def test_windows_show_every_action_and_count_their_padding(length, stride):
    window = WindowConfig(frames=5, action_video_freq_ratio=2, stride=stride)
    actions = np.arange(1, length + 1, dtype=np.float32)[:, None]
    seen = set()
    for w in windows_of(length, window):
        assert w.start % stride == 0
        cut = cut_actions(actions, w.start, window)
        assert cut.shape == (8, 1)
        assert (cut != 0).sum() == w.valid_actions
        seen |= set(cut[: w.valid_actions, 0])
        shown = frame_indices(w.start, length, window)
        assert shown[: w.valid_frames].tolist() == [w.start + 2 * i for i in range(w.valid_frames)]
        assert (shown[w.valid_frames :] == length - 1).all()
        assert w.valid_frames > 1 or length <= 2  # a still window only where the episode has nothing else
    assert seen == set(actions[:, 0])


@pytest.mark.parametrize(("size", "target"), [((100, 200), (64, 64)), ((200, 100), (64, 128)), ((48, 64), (96, 96))])
def test_pictures_cover_the_target_without_stretching(size, target):
    height, width = size
    y, x = np.mgrid[:height, :width]
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    radius = 0.4 * min(height / target[0], width / target[1]) * min(target)
    disc = np.where(x**2 + y**2 < radius**2, 255, 0).astype(np.uint8)
    out = cover(np.repeat(disc[None, ..., None], 3, axis=-1), *target)
    assert out.shape == (1, *target, 3)
    inside = out[0, ..., 0] > 127
    # a disc in the centre stays a disc in the centre, at the scale that covers the target
    assert abs(inside.any(0).sum() - inside.any(1).sum()) <= 1
    assert abs(inside.any(0).sum() - 0.8 * min(target)) <= 2
    rows, columns = np.nonzero(inside)
    np.testing.assert_allclose([rows.mean(), columns.mean()], [(t - 1) / 2 for t in target], atol=0.6)


def test_instruction_is_the_task_that_is_not_the_validity_note():
    assert choose_task(["valid", "pick the pear"]) == "pick the pear"
    assert choose_task(["open the drawer", "valid"]) == "open the drawer"
    assert choose_task(["valid", ""]) is None
