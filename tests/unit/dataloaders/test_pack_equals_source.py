"""Packed windows against the dataset's own parquet and video files, read with pyarrow and PyAV alone."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from support.bad_datasets import lines
from support.lerobot_layouts import as_version_2, direct_read
from support.packed_samples import packed_samples, psnr

from dataloaders.config import WindowConfig
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.lerobot.writer import LeRobotWriter
from dataloaders.packing.pack import pack
from dataloaders.shards import read_index
from dataloaders.simulators.collect import simulate
from dataloaders.windows import cover

SMALL = WindowConfig(frames=5, action_video_freq_ratio=2, stride=4, height=64, width=64)
WINDOWS = {
    "lerobot_v20_gr1": WindowConfig(frames=9, action_video_freq_ratio=4, stride=97, height=128, width=128),
    "lerobot_v30_metaworld": WindowConfig(frames=9, action_video_freq_ratio=4, stride=13, height=64, width=64),
    "simulated": SMALL,
    "v2.1": SMALL,
    "v2.0": SMALL,
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "push2d"
    simulate(env="push2d", tasks=[], episodes_per_task=2, out=out, size=64, processes=1)
    return out


@pytest.fixture(scope="module")
def sources(simulated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")

    def find(name: str, request) -> Path:
        if name == "simulated":
            return simulated
        if name in ("v2.0", "v2.1"):
            root = folder / name
            return root if root.exists() else as_version_2(simulated, root, name)
        return request.getfixturevalue("shared") / "samples" / name

    return find


@pytest.fixture(scope="module")
def direct():
    """`direct_read`, once per source."""
    return functools.cache(direct_read)


@pytest.mark.parametrize("name", list(WINDOWS))
def test_windows_are_what_the_files_hold(name, sources, direct, request, tmp_path):
    source, window = sources(name, request), WINDOWS[name]
    (camera,) = LeRobotDataset(source).camera_keys
    episodes = direct(source, camera)
    index = pack(source, tmp_path / "out", window=window, prompt_template="{task}")
    samples = packed_samples(tmp_path / "out")
    ratio, count = window.action_video_freq_ratio, (window.frames - 1) * window.action_video_freq_ratio
    seen = set()
    for sample in samples:
        episode, start = episodes[sample.meta["episode"]], sample.meta["start"]
        length = len(episode["action"])
        seen.add((sample.meta["episode"], start))
        actions = episode["action"][start : start + count]
        padded = np.concatenate([actions, np.zeros((count - len(actions), actions.shape[1]), np.float32)])
        assert sample.arrays["action"].tobytes() == padded.tobytes()
        assert sample.meta["valid_actions"] == len(actions)
        assert sample.arrays["state"].tobytes() == episode["observation.state"][start].tobytes()
        rows = np.minimum(start + ratio * np.arange(window.frames), length - 1)
        shown = cover(episode["frames"][rows], window.height, window.width)
        assert psnr(sample.frames, shown) > 30
        assert np.abs(sample.frames.astype(int) - shown).mean() < 4
    lengths = {number: len(episode["action"]) for number, episode in episodes.items()}
    starts = {(n, s) for n, length in lengths.items() for s in range(0, max(length - ratio, 1), window.stride)}
    assert seen == starts
    assert len(samples) == len(seen) == index["samples"]
    assert index["source"]["frames"] == sum(lengths.values())


@pytest.mark.parametrize("fps", [5, 12.5, 29.97, 50])
def test_any_frame_rate_and_several_cameras_of_several_sizes(tmp_path, fps):
    cameras = {
        "observation.images.head": (48, 64),
        "observation.images.left": (32, 32),
        "observation.images.right": (64, 64),
    }
    names = {"state_names": list("abc"), "action_names": list("abcdefg")}
    rng = np.random.default_rng(0)
    levels = np.array([40, 120, 200], np.uint8)
    with LeRobotWriter(tmp_path / "set", fps=fps, robot_type="arms", cameras=cameras, **names) as writer:
        for length in (90, 11):
            frames = {
                key: np.broadcast_to(
                    (levels[i] + 4 * (np.arange(length, dtype=np.uint8) % 12))[:, None, None, None], (length, *size, 3)
                ).copy()
                for i, (key, size) in enumerate(cameras.items())
            }
            writer.add_episode(frames, rng.normal(size=(length, 3)), rng.normal(size=(length, 7)), "go")
    window = WindowConfig(
        frames=5, action_video_freq_ratio=3, stride=7, height=96, width=64, layout="head_over_wrists",
        cameras=["observation.images.head", "observation.images.right", "observation.images.left"],
    )  # fmt: skip
    index = pack(tmp_path / "set", tmp_path / "out", window=window, prompt_template="{task}")
    assert index["fps"] == pytest.approx(fps)
    assert index["source"]["cameras"] == window.cameras
    assert index["shapes"] == [{"frames": 5, "height": 96, "width": 64, "samples": index["samples"]}]
    assert (index["action_dim"], index["state_dim"]) == (7, 3)
    for sample in packed_samples(tmp_path / "out"):
        rows = np.minimum(sample.meta["start"] + 3 * np.arange(5), (89, 10)[sample.meta["episode"]])
        frames = sample.frames.astype(float)
        shades = (frames[:, :64], frames[:, 64:, :32], frames[:, 64:, 32:])
        for shown, level in zip(shades, levels[[0, 2, 1]]):
            assert shown.mean(axis=(1, 2, 3)) == pytest.approx(level + 4 * (rows % 12), abs=2.6)


def test_parts_and_several_columns_make_a_vector(shared, direct, tmp_path):
    source = shared / "samples/lerobot_v20_gr1"
    parts = json.loads((source / "meta/modality.json").read_text())["action"]
    camera = LeRobotDataset(source).camera_keys[0]
    window = WindowConfig(frames=5, stride=200, height=64, width=64)
    window.action_key = "action.right_arm+action.right_hand"
    window.state_key = "observation.state[22:29]+observation.state[0:1]"
    index = pack(source, tmp_path / "out", window=window, prompt_template="{task}")
    picked = [d for name in ("right_arm", "right_hand") for d in range(parts[name]["start"], parts[name]["end"])]
    assert (index["action_dim"], index["state_dim"]) == (len(picked), 8) == (13, 8)
    assert list(read_index(tmp_path / "out").statistics()["action"]) == [window.action_key]
    episodes = direct(source, camera)
    for sample in packed_samples(tmp_path / "out"):
        episode, start = episodes[sample.meta["episode"]], sample.meta["start"]
        valid = sample.meta["valid_actions"]
        assert np.array_equal(sample.arrays["action"][:valid], episode["action"][start : start + valid, picked])
        assert np.array_equal(sample.arrays["state"][0], episode["observation.state"][start, [*range(22, 29), 0]])


def test_absolute_actions_become_differences_to_the_windows_state(simulated, tmp_path):
    window = WindowConfig(
        frames=5, action_video_freq_ratio=2, stride=4, height=64, width=64, action_values="minus_state"
    )
    plain = WindowConfig(frames=5, action_video_freq_ratio=2, stride=4, height=64, width=64)
    pack(simulated, tmp_path / "deltas", window=window, prompt_template="{task}")
    pack(simulated, tmp_path / "plain", window=plain, prompt_template="{task}")
    recorded = {sample.key: sample for sample in packed_samples(tmp_path / "plain")}
    for sample in packed_samples(tmp_path / "deltas"):
        other, valid = recorded[sample.key], sample.meta["valid_actions"]
        state = sample.arrays["state"][0, : sample.arrays["action"].shape[1]]
        assert np.array_equal(sample.arrays["action"][:valid], other.arrays["action"][:valid] - state)
        assert (sample.arrays["action"][valid:] == 0).all()
    stats = read_index(tmp_path / "deltas").statistics()["action"]["action"]
    shown = np.concatenate([s.arrays["action"][: s.meta["valid_actions"]] for s in packed_samples(tmp_path / "deltas")])
    np.testing.assert_allclose(stats["global_mean"], shown.mean(0, dtype=np.float64), atol=1e-5)
    np.testing.assert_array_equal(np.float32(stats["global_max"]), shown.max(0))


def test_videos_of_a_robot_set_can_be_packed_without_its_numbers(simulated, tmp_path):
    window = WindowConfig(
        frames=5, action_video_freq_ratio=2, stride=8, height=64, width=64, state_key="", action_key=""
    )
    index = pack(simulated, tmp_path / "out", window=window, prompt_template="{task}")
    assert (index["action_dim"], index["state_dim"], index["clips"]) == (0, 0, None)
    for sample in packed_samples(tmp_path / "out"):
        assert not sample.arrays


def test_the_task_of_a_window_is_that_of_its_first_frame(tmp_path, simulated):
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = as_version_2(simulated, tmp_path / "set", "v2.1")
    tasks = [{"task_index": i, "task": task} for i, task in enumerate(("reach", "push"))]
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    lines("meta/episodes.jsonl", lambda rows: [row | {"tasks": ["push", "reach"]} for row in rows])(root)
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    halves = pa.array([int(i >= 10) for i in range(table.num_rows)])
    pq.write_table(table.set_column(table.schema.get_field_index("task_index"), "task_index", halves), path)
    pack(root, tmp_path / "out", window=SMALL, prompt_template="{task}")
    told = {s.meta["start"]: s.meta["task"] for s in packed_samples(tmp_path / "out") if s.meta["episode"] == 0}
    assert told == {start: "push" if start >= 10 else "reach" for start in told}
    assert set(told.values()) == {"reach", "push"}
