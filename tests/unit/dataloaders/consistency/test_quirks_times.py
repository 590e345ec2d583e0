"""Times, order and numbers of datasets that others wrote: what is learned is right, or refused by its cause."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.quirky_datasets import FPS, FRONT, WINDOW, numbers_in, rows, samples_of, write_v21, write_v30

from dataloaders.config import BelieveConfig, WindowConfig
from dataloaders.consistency.report import read_report
from dataloaders.lerobot.reader import LeRobotDataset
from dataloaders.packing.pack import pack
from dataloaders.packing.statistics import DatasetStatistics
from dataloaders.shards import read_index
from kairos_train.basics.errors import UserError

I = np.arange(20)  # noqa: E741, rows of an episode


def packed(root: Path, window: WindowConfig = WINDOW, *, tolerance: float = 1e-4, **believe: str) -> dict:
    """The samples of a dataset by (episode, start)."""
    out = root.with_name(f"{root.name}_shards")
    pack(
        root,
        out,
        window=window,
        prompt_template="{task}",
        believe=BelieveConfig(**believe),
        timestamp_tolerance=tolerance,
    )
    return samples_of(out)


def named(root: Path) -> dict[str, str]:
    """What was believed of each contradiction that packing reported."""
    found = read_report(root.with_name(f"{root.name}_shards"))
    return {entry["name"]: entry["believed"] for entry in found["contradictions"]}


def refused(root: Path, match: str, **settings) -> str:
    with pytest.raises(UserError, match=match) as caught:
        packed(root, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shown(samples: dict, start: int = 0) -> list[int]:
    return samples[0, start]["shows"]


def test_a_clean_dataset_has_no_contradictions(tmp_path):
    for root in (write_v21(tmp_path / "v21", [rows(9), rows(12, 1, 9)]), write_v30(tmp_path / "v30")):
        samples = packed(root)
        assert named(root) == {}
        assert all(sample["state"][0, 0] == start for (_, start), sample in samples.items())
    assert shown(packed(write_v21(tmp_path / "one")), 3) == [3, 4, 5, 6, 7]


# ---- clocks and offsets


def test_clock_times_are_counted_from_the_first_row(tmp_path):
    root = write_v21(tmp_path / "set", [rows(20, timestamp=pa.array(1.7e9 + I / FPS))])
    samples = packed(root)
    assert [shown(samples, start) for start in (0, 7)] == [[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]]
    assert named(root) == {"offset": "the timestamps since the first row, which span all of these frames"}


@pytest.mark.parametrize("kind", ["timestamp", "duration"])
def test_a_column_of_times_has_its_own_unit(tmp_path, kind):
    nanoseconds = pa.array((1.7e18 + I * 10**8).astype(np.int64))
    times = nanoseconds.cast(pa.timestamp("ns") if kind == "timestamp" else pa.duration("ns"))
    samples = packed(write_v21(tmp_path / "set", [rows(20, timestamp=times)]))
    assert shown(samples, 5) == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("times", "match"),
    [
        (
            np.float32(1.7e9 + I / FPS),
            r"float32 near 1\.7e\+09, where it steps by 128 s; meta/info\.json has frames 0\.1",
        ),
        (
            (1.7e18 + I * 1e8).astype(np.int64),
            r"info\.json says 10 fps; timestamp says 1e-08 fps .* as if in nanoseconds",
        ),
        (I * 100.0, r"timestamp says 0\.01 fps .* as if in milliseconds"),
        (1.7e9 + I / 5, r"info\.json says 10 fps; timestamp says 5 fps"),
        (np.float32(1.05e6 + I / 10), r"float32 near 1\.05e\+06, where it steps by 0\.125 s"),
        (np.where(I == 7, np.nan, I / 10), "not finite"),
        (np.where(I == 7, 0.6, I / 10), "does not rise at row 7"),
    ],
)
def test_timestamps_that_cannot_tell_the_frame_are_refused_by_name(tmp_path, times, match):
    root = write_v21(tmp_path / "set", [rows(20, timestamp=pa.array(times))])
    assert "data.believe." in refused(root, match)


@pytest.mark.parametrize("times", [np.float32(1.7e9 + I / FPS), np.where(I == 7, 0.6, I / 10)])
def test_frame_index_is_believed_where_it_is_said_to_be_right(tmp_path, times):
    root = write_v21(tmp_path / "set", [rows(20, timestamp=pa.array(times))])
    assert shown(packed(root, frames="frame_index"), 9) == [9, 10, 11, 12, 13]
    assert named(root)["frames"] == "frame_index"


def test_a_clock_in_float32_is_honoured_where_it_can_tell_frames_apart(tmp_path):
    root = write_v21(tmp_path / "set", [rows(20, timestamp=pa.array(np.float32(5e4 + I / FPS)))])  # steps of 4 ms
    assert shown(packed(root), 15) == [15, 16, 17, 18, 19]


def test_trimmed_rows_keep_their_frames(tmp_path):
    trimmed = rows(15, timestamp=pa.array(np.float32((np.arange(15) + 5) / FPS)))
    root = write_v21(tmp_path / "set", [trimmed], shown=range(20))
    samples = packed(root)
    assert shown(samples) == [5, 6, 7, 8, 9]
    assert samples[0, 0]["state"][0, 0] == 0
    assert named(root) == {"frames": "timestamps, as LeRobot's reader does"}


def test_trimmed_rows_with_their_old_frame_index_are_no_contradiction(tmp_path):
    times, numbers = np.float32((np.arange(15) + 5) / FPS), pa.array(np.arange(15) + 5)
    root = write_v21(tmp_path / "set", [rows(15, timestamp=pa.array(times), frame_index=numbers)], shown=range(20))
    assert shown(packed(root)) == [5, 6, 7, 8, 9]
    assert named(root) == {}


def test_two_opinions_that_both_fit_the_video_are_refused_until_one_is_chosen(tmp_path):
    numbers = pa.array(np.arange(15) + 5)  # the timestamps were made new, from 0
    root = write_v21(tmp_path / "set", [rows(15, frame_index=numbers)], shown=range(20))
    refused(root, r"timestamp says frame 0 of the video at row 0; frame_index says 5; .*data\.believe\.frames")
    assert shown(packed(root, frames="frame_index")) == [5, 6, 7, 8, 9]
    (tmp_path / "set").rename(tmp_path / "other")
    assert shown(packed(tmp_path / "other", frames="timestamps")) == [0, 1, 2, 3, 4]


def test_an_offset_without_as_many_frames_as_rows_is_refused(tmp_path):
    root = write_v21(tmp_path / "set", [rows(15, timestamp=pa.array(1.7e9 + np.arange(15) / FPS))], shown=range(20))
    refused(root, "20 frames from 0 to 1.9 s for 15 rows")


def test_rows_of_a_part_of_a_video_do_not_reach_into_the_next(tmp_path):
    late = {0: 0.1}  # the first episode's part begins a frame late, as a converter's rounding had it

    def change(row: dict) -> dict:
        key = f"videos/{FRONT}/from_timestamp"
        return row | {key: row[key] + late.get(row["episode_index"], 0)}

    refused(write_v30(tmp_path / "set", change=change), "7 frames from 0.1 to 0.7 s for 8 rows")


def test_parts_of_a_video_that_overlap_are_refused_or_believed(tmp_path):
    def change(row: dict) -> dict:
        early = 0.2 if row["episode_index"] == 1 else 0
        return row | {
            f"videos/{FRONT}/{end}_timestamp": row[f"videos/{FRONT}/{end}_timestamp"] - early for end in ("from", "to")
        }

    root = write_v30(tmp_path / "set", change=change)
    refused(root, r"episode 1: video_parts: episode 0 has its part to 0\.8 s; episode 1 has its part from 0\.6 s")
    assert packed(root, video_parts="table")[1, 0]["shows"] == [6, 7, 8, 9, 10]


# ---- rates


def test_rates_that_differ_are_refused_and_either_can_be_believed(tmp_path):
    root = write_v21(tmp_path / "set", fps=30)
    refused(root, r"info\.json says 30 fps; timestamp says 10 fps \(its median step is 0\.1 s\)")
    for side, fps in (("timestamps", 10), ("info", 30)):
        out = tmp_path / side
        pack(root, out, window=WINDOW, prompt_template="{task}", believe=BelieveConfig(fps=side))
        samples = samples_of(out)
        assert (read_index(out).fps, samples[0, 4]["fps"]) == (fps, fps)
        assert samples[0, 4]["shows"] == [4, 5, 6, 7, 8]
        assert {"name": "fps", "believed": side}.items() <= read_report(out)["contradictions"][0].items()


def test_29_97_passes_for_30(tmp_path):
    rate = 30000 / 1001
    root = write_v21(tmp_path / "set", [rows(20, timestamp=pa.array(I / rate))], video_fps=rate, fps=30)
    assert shown(packed(root), 8) == [8, 9, 10, 11, 12]
    assert named(root) == {}


@pytest.mark.parametrize("drift", [0.0008, 0.0002])
def test_drift_is_refused_with_the_tolerance_that_passes(tmp_path, drift):
    root = write_v21(tmp_path / "set", [rows(20, timestamp=pa.array(I / FPS + drift * I))])
    message = refused(root, r"farther than the tolerance of 0\.0001 s.*data\.timestamp_tolerance=\S+ would pass$")
    tolerance = float(message.rpartition("data.timestamp_tolerance=")[2].split()[0])
    assert drift * 19 <= tolerance < 1.2 * drift * 19
    assert shown(packed(root, tolerance=tolerance), 15) == [15, 16, 17, 18, 19]


def test_jitter_of_rows_with_inline_images_counts_too(tmp_path):
    jitter = pa.array(I / FPS + 0.01 * (I % 2))
    root = write_v21(tmp_path / "set", [rows(20, timestamp=jitter)], inline=True)
    message = refused(root, "is 0.01 s off the frames' 0.1 s at row 1")
    tolerance = float(message.rpartition("data.timestamp_tolerance=")[2].split()[0])
    assert shown(packed(root, tolerance=tolerance), 2) == [2, 3, 4, 5, 6]


def test_a_tolerance_of_half_a_frame_is_refused(tmp_path):
    refused(
        write_v21(tmp_path / "set"), r"timestamp_tolerance=0\.05: frames at 10 fps are 0\.1 s apart", tolerance=0.05
    )


# ---- order and gaps


@pytest.mark.parametrize("inline", [False, True])
def test_rows_are_sorted_by_frame_index(tmp_path, inline):
    order = np.r_[0, np.random.default_rng(0).permutation(np.arange(1, 20))]
    pictures = order if inline else None  # inline images lie beside their rows
    shown_in_video = None if inline else range(20)
    root = write_v21(
        tmp_path / "set", [rows(20).take(order)], inline=inline, shown=pictures if inline else shown_in_video
    )
    samples = packed(root)
    for start in (0, 6, 15):
        assert shown(samples, start) == list(range(start, start + 5))
        assert samples[0, start]["action"][:, 0].tolist() == [start + k + 0.5 for k in range(4)]
    assert named(root) == {"order": "frame_index"}


def test_frame_index_against_timestamps_is_refused(tmp_path):
    root = write_v21(tmp_path / "set", [rows(20, frame_index=pa.array(19 - I))], inline=True)
    refused(
        root, r"the rows lie in another order; frame_index goes from 19 to 18 at row 1; timestamp orders them differ"
    )
    assert shown(packed(root, order="timestamps"), 2) == [2, 3, 4, 5, 6]


def test_a_frame_index_twice_is_refused(tmp_path):
    root = write_v21(tmp_path / "set", [rows(20, frame_index=pa.array(I // 2))], shown=range(30))
    refused(root, "a frame_index is there twice")
    assert shown(packed(root, order="rows"), 7) == [7, 8, 9, 10, 11]


def test_rows_without_a_frame_index_must_lie_in_the_order_of_their_times(tmp_path):
    order = np.r_[0, 2, 1, 3:20]
    root = write_v21(tmp_path / "set", [rows(20, frame_index=None).take(order)], shown=range(20))
    refused(root, r"timestamp goes back at row 2")
    assert shown(packed(root, order="timestamps"), 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize("counted", [False, True])
def test_windows_end_before_a_gap(tmp_path, inline, counted):
    times = np.where(I < 8, I, I + 20)
    numbers = times if counted else I
    table = rows(20, timestamp=pa.array(np.float32(times / FPS)), frame_index=pa.array(numbers))
    root = write_v21(tmp_path / "set", [table], inline=inline, shown=times if inline else range(40))
    samples = packed(root)
    assert sorted(start for _, start in samples) == [*range(7), *range(8, 19)]
    assert shown(samples, 2) == [2, 3, 4, 5, 6]
    assert (shown(samples, 5), samples[0, 5]["valid_frames"]) == ([5, 6, 7, 7, 7], 3)
    assert (samples[0, 5]["valid_actions"], samples[0, 5]["action"][3:].tolist()) == (3, [[0, 0]])
    assert shown(samples, 8) == [28, 29, 30, 31, 32]
    assert samples[0, 8]["state"][0, 0] == 8
    assert named(root)["gap"] == "rows are missing: windows end before it"
    statistics = read_index(root.with_name("set_shards")).statistics()
    assert (statistics["num_episodes"], statistics["num_transition"]) == (1, 20)


def test_statistics_count_what_the_windows_of_runs_show():
    window = WindowConfig(frames=5, action_video_freq_ratio=1)
    states, actions = np.zeros((20, 1)), np.arange(20.0)[:, None]
    statistics = DatasetStatistics(window, state_key="s", action_key="a")
    statistics.add(states, actions, [(0, 8), (8, 9), (9, 20)])
    last = statistics.result()["action"]["a"]["stepwise_max"][3][0]
    first = statistics.result()["action"]["a"]["stepwise_min"][3][0]
    assert (first, last) == (3, 19)
    found = [n for step in statistics._steps for n in step.rows()[0][:, 0]]
    assert 8 not in found, "a run of one frame gives no window"


# ---- numbers


def wide(values: np.ndarray) -> pa.Array:
    return pa.array(values.tolist(), pa.list_(pa.float64()))


def test_differences_are_taken_before_rounding(tmp_path):
    state = 50000 + np.stack([0.1 * I, I], axis=1)
    table = rows(20, **{"observation.state": wide(state), "action": wide(state + 0.1)})
    window = WindowConfig(frames=5, action_video_freq_ratio=1, height=32, width=32, action_values="minus_state")
    samples = packed(write_v21(tmp_path / "set", [table]), window)
    expected = np.float32([[0.1 + 0.1 * k, 0.1 + k] for k in range(4)])
    np.testing.assert_allclose(samples[0, 7]["action"], expected, rtol=0, atol=1e-6)
    assert samples[0, 7]["action"].dtype == samples[0, 7]["state"].dtype == np.float32
    top = read_index(tmp_path / "set_shards").statistics()["action"]["action"]["global_max"]
    np.testing.assert_allclose(top, [0.4, 3.1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("observation.state", 5334000 + np.stack([0.1 * I, I * 10], axis=1)),
        ("action", 10.0**9 + np.stack([I, I * 1000], axis=1)),
        ("action", 1000 + np.stack([5e-5 * I, I], axis=1)),  # a slow movement, of which little is left
    ],
)
def test_steps_that_float32_cannot_hold_are_refused(tmp_path, column, values):
    root = write_v21(tmp_path / "set", [rows(20, **{column: wide(values)})])
    refused(root, rf"_key={column}: dimension 0 moves by .* float32.* resolves \S+ there: subtract an origin")


def test_movements_at_rest_are_no_steps(tmp_path):
    noise = np.random.default_rng(0).normal(0, 1e-9, (20, 2)) + np.array([0.5, 1000])
    packed(write_v21(tmp_path / "set", [rows(20, **{"observation.state": wide(noise)})]))


def test_the_reader_alone_refuses_too(tmp_path):
    root = write_v21(tmp_path / "set", fps=30)
    with pytest.raises(UserError, match="says 30 fps"):
        LeRobotDataset(root).episode(0)
    episode = LeRobotDataset(root, believe=BelieveConfig(fps="info")).episode(0)
    assert numbers_in(episode.frames(FRONT, [3, 1])) == [3, 1]


def test_skipped_episodes_are_in_the_report(tmp_path):
    bad = rows(12, 1, 9, timestamp=pa.array(np.float32(1.7e9 + np.arange(12) / FPS)))
    root = write_v21(tmp_path / "set", [rows(9), bad], shown=range(12))
    out = tmp_path / "out"
    pack(root, out, window=WINDOW, prompt_template="{task}", on_bad="skip")
    assert {episode for episode, _ in samples_of(out)} == {0}
    found = read_report(out)
    assert found["unresolved"] == 0
    assert "neither: left out" in {entry["believed"] for entry in found["contradictions"]}
    assert "float32" in json.loads((out / "quarantine.jsonl").read_text())["reason"]
