"""LeRobot datasets and shards that want memory or what lies elsewhere: left out in one line, or refused in one."""

import io
import json
import os
import re
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packed_samples import packed_samples
from support.toy_shards import toy_key, toy_loader, toy_members, write_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
from attack_parts import cases, robots
from attack_parts import clips as hostile

from dataloaders.config import LimitsConfig, WindowConfig
from dataloaders.files.npy import read_npy
from dataloaders.files.tables import read_table
from dataloaders.files.video_encoder import encode_mp4
from dataloaders.packing.pack import QUARANTINE, pack
from dataloaders.shards import read_index, read_shard
from kairos_train.basics.errors import UserError

WINDOW = WindowConfig(frames=5, action_video_freq_ratio=1, stride=2, height=32, width=32)
LIMITS = LimitsConfig(table_mb=1, episodes=20, json_mb=0.2)


def many_episodes(root: Path) -> None:
    (root / "meta/episodes.jsonl").write_text('{"episode_index": 0, "length": 1}\n' * 21)


EPISODES = {
    "equal numbers": (robots.rows(lambda: robots.zeros(200_000)), r"more than data\.limits\.table_mb=1 in memory"),
    "a long vector": (
        robots.column("x", lambda: robots.vector_of_zeros(200_000)),
        r"more than data\.limits\.table_mb=1",
    ),
    "equal texts": (robots.rows(lambda: robots.one_text(2000, 2000)), r"more than data\.limits\.table_mb=1 in memory"),
    "a list of equal texts": (
        robots.column("x", lambda: robots.list_of_one_text(2000, 2000)),
        "than data.limits.table",
    ),
    "a hollow table": (robots.hole("data/1.parquet", 1 << 43), "1.parquet: is not a readable parquet file"),
    "a last timestamp that is no number": (
        robots.column("timestamp", robots.late_nan),
        "values that are not finite",
    ),
    "a long name": (robots.episode(episode_index=10**17), "the file is missing"),
    "a score of 400 digits": (robots.episode(score_a="JSON:" + "1" * 400), "score a is inf; it must be a number"),
    "a long caption": (
        robots.episode(caption_a="x" * 30_000),
        "caption a has 30,000 characters, more",
    ),
    "a picture behind a linked folder": (robots.linked_picture, "'link/private.png' leads out of the folder"),
}

DATASETS = cases.DATASETS | {
    "many episodes": (many_episodes, r"more than data\.limits\.episodes=20 entries"),
}


def packed(source: Path, out: Path, limits: LimitsConfig = LIMITS, on_bad: str = "skip") -> list[str]:
    """The lines of quarantine."""
    pack(source, out, window=WINDOW, prompt_template="{task}", limits=limits, on_bad=on_bad)
    text = (out / QUARANTINE).read_text() if (out / QUARANTINE).exists() else ""
    return [f"{line['name']}: {line['reason']}" for line in map(json.loads, text.splitlines())]


@pytest.mark.parametrize("name", EPISODES)
def test_a_bad_episode_is_one_line_and_the_other_is_packed(tmp_path, name):
    damage, match = EPISODES[name]
    source = robots.dataset(tmp_path / "set", damage)
    (line,) = packed(source, tmp_path / "out")
    assert re.search(match, line)
    assert line.isprintable()
    assert len(line) < 700
    assert {sample.meta["episode"] for sample in packed_samples(tmp_path / "out")} == {0}
    with pytest.raises(UserError, match=match):
        packed(source, tmp_path / "stopped", on_bad="stop")


@pytest.mark.parametrize("name", DATASETS)
def test_a_bad_dataset_is_refused_in_one_line(tmp_path, name):
    damage, match = DATASETS[name]
    source = robots.dataset(tmp_path / "set", damage)
    for on_bad in ("skip", "stop"):
        with pytest.raises(UserError, match=match) as caught:
            packed(source, tmp_path / "out", on_bad=on_bad)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


def test_what_is_announced_but_not_there_costs_nothing(tmp_path):
    """A billion dimensions, of which notes would list those that never move."""
    source = robots.dataset(tmp_path / "set", robots.info(features=cases.FEATURES, robot_type=["x" * 1000]))
    assert packed(source, tmp_path / "out") == []
    assert read_index(tmp_path / "out").source["robot_type"] is None


def test_a_root_that_a_setting_names_may_hold_a_datasets_files(tmp_path):
    allowed = replace(LIMITS, allowed_roots=[str(tmp_path)])
    for number, damage in enumerate((robots.linked_videos, robots.linked_picture)):
        source = robots.dataset(tmp_path / f"set{number}", damage)
        assert packed(source, tmp_path / f"out{number}", allowed) == []
    within = robots.dataset(tmp_path / "within", lambda root: os.rename(root / "videos", root / "real"))
    (within / "videos").symlink_to("real", target_is_directory=True)
    assert packed(within, tmp_path / "out") == []


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_tables_read_piece_by_piece_are_what_pyarrow_reads(tmp_path_factory, data):
    """Dictionaries decoded, in whatever row groups and pages."""
    path = tmp_path_factory.mktemp("table") / "a.parquet"
    texts = st.none() | st.text(max_size=5)
    kinds = {
        "number": (pa.float64(), st.floats(allow_nan=False) | st.none()),
        "text": (pa.string(), texts),
        "word": (pa.dictionary(pa.int32(), pa.string()), texts),
        "vector": (pa.list_(pa.int64()), st.lists(st.integers(-9, 9), max_size=3) | st.none()),
        "words": (pa.list_(pa.string()), st.lists(texts, max_size=3) | st.none()),
        "picture": (
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            st.fixed_dictionaries({"bytes": st.binary(max_size=4), "path": texts}) | st.none(),
        ),
    }
    rows = data.draw(st.integers(0, 12))
    columns = {
        name: pa.array(data.draw(st.lists(v, min_size=rows, max_size=rows)), k) for name, (k, v) in kinds.items()
    }
    options = {"row_group_size": data.draw(st.integers(1, 20)), "use_dictionary": data.draw(st.booleans())}
    options["dictionary_pagesize_limit"] = data.draw(st.sampled_from([8, 1 << 20]))
    pq.write_table(pa.table(columns), path, **options)
    wanted = data.draw(st.none() | st.lists(st.sampled_from(sorted(kinds)), min_size=1, unique=True))
    found = read_table(path, LimitsConfig(), columns=wanted)
    assert found.to_pydict() == pq.ParquetFile(path).read(columns=wanted).to_pydict()
    assert not any(pa.types.is_dictionary(kind) for kind in found.schema.types)


# --- shards ---

NPY = b"\x93NUMPY\x01\x00"


def npy(shape: str, dtype: str = "<f4") -> bytes:
    """A .npy file of no data; its header says what it likes."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    return NPY + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


MEMBERS = {
    "a list of files": ({"mp4": b"ffconcat version 1.0\nfile private.mp4\n"}, "no mp4 file as its name says"),
    "Matroska": ({"mp4": hostile.encoded("matroska", frames=5, height=32, width=32)}, "no mp4 file as its name says"),
    "promised frames": ({"mp4": hostile.promised_frames(2**31)}, r"more than data\.limits\.frames"),
    "a larger video": (
        {"mp4": hostile.encoded(frames=5)},
        r"frames of shape \(5, 64, 96, 3\), expected",
    ),
    "deep JSON": ({"json": hostile.nested(30_000).encode()}, "is nested deeper than 32"),
    "400 digits": (
        {"json": b'{"text": "a", "valid_actions": %s}' % (b"1" * 400)},
        "valid_actions is inf; it must",
    ),
    "no number": ({"json": b'{"text": "a", "valid_actions": NaN}'}, "valid_actions is nan; it must be a whole number"),
    "an exabyte": ({"action.npy": npy("(1152921504606846976, 3)")}, "holds 0 bytes of data, its header says"),
    "more than an exabyte": ({"state.npy": npy("(1, " + "9" * 40 + ")")}, "holds 0 bytes of data, its header says"),
    "pickled objects": ({"state.npy": npy("(1, 2)", "|O")}, "holds pickled objects"),
    "a header of code": ({"state.npy": npy("(__import__('os').getpid(), 2)")}, "Cannot parse header|malformed"),
    "large members": (
        {"other": bytes(400_000)},
        "has members of more than 300,000 bytes",
    ),
}


def test_a_hostile_sample_is_one_line_and_another_is_trained_on(tmp_path):
    file = io.BytesIO()
    encode_mp4(file, np.zeros((5, 32, 32, 3), np.uint8), 10.0)
    bad = [members for members, _ in MEMBERS.values()]
    count = len(bad) + 6

    def members(number: int) -> dict[str, bytes]:
        good = toy_members(number, encoded=False, clip=file.getvalue())
        return good | bad[number] if number < len(bad) else good

    folder = write_folder(tmp_path / "shards", [count], members)
    loader = toy_loader(
        folder, batch_size=count, streams=1, with_frames=True, on_corrupt="skip", limits=LimitsConfig(member_mb=0.3)
    )
    batch = next(loader)
    assert set(batch.keys) == {toy_key(number) for number in range(len(bad), count)}
    assert len(loader.skipped) == len(bad)
    for number, (name, (_, match)) in enumerate(MEMBERS.items()):
        reason = loader.skipped[f"shard-000000.tar/{toy_key(number)}"]["reason"]
        assert re.search(match, reason), f"{name}: {reason}"
        assert len(reason) <= 400
    loader.close()


HUGE = [{"frames": 5, "height": 10**9, "width": 10**9, "samples": 4}]
INDICES = {
    "deep": (hostile.nested(30_000), "cannot be read as JSON .is nested deeper than 32"),
    "large samples": ({"shapes": HUGE}, "samples of 5 frames of 1000000000x1000000000 are none that are packed"),
    "no shapes": ({"shapes": [{"frames": 5}]}, "incomplete or unknown entry"),
    "shapes of texts": ({"shapes": [HUGE[0] | {"height": "x"}]}, "a shape's size is 'x'; it must be a whole number"),
    "400 digits": ('{"format": "kairos-shards-1", "fps": %s, "shards": []' % ("1" * 400), "cannot be read as JSON"),
    "actions without end": ({"action_dim": 10**400}, "action_dim is inf; it must be a whole number"),
    "a rate that is none": ({"fps": 0}, "fps is 0"),
    "a window of text": ({"window": ["x"]}, "WindowConfig: unknown key 'x'"),
    "shards of numbers": ({"shards": [1, 2]}, "incomplete or unknown entry"),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_hostile_index_is_refused_in_one_line(tmp_path, name):
    change, match = INDICES[name]
    folder = write_folder(tmp_path / "shards", [4])
    path = folder / "index.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=match) as caught:
        read_index(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_hollow_index_is_not_read(tmp_path):
    folder = write_folder(tmp_path / "shards", [4])
    os.truncate(folder / "index.json", 1 << 43)
    with pytest.raises(UserError, match=r"index\.json: has 8796093022208 bytes, more than the 32000000"):
        read_index(folder)


@settings(max_examples=50)
@given(st.binary(max_size=200), st.integers(0, 117))
def test_any_header_of_an_array_gives_one_or_an_error(noise, at):
    whole = npy("(2, 2)") + bytes(16)
    for content in (noise, NPY + noise, whole[:at] + noise[:8] + whole[at + len(noise[:8]) :]):
        with suppress(ValueError):
            assert read_npy(content).nbytes <= len(content)
    assert read_npy(whole).shape == (2, 2)


def test_shards_are_what_webdataset_reads(tmp_path):
    from webdataset.tariterators import group_by_keys, tar_file_expander

    folder = write_folder(tmp_path / "shards", [4])
    (shard,) = read_index(folder).shards
    with (folder / shard.name).open("rb") as stream:
        theirs = list(group_by_keys(tar_file_expander(iter([{"url": shard.name, "stream": stream}]))))
    ours = list(read_shard(folder, shard))
    assert [sample["__key__"] for sample in theirs] == [sample["__key__"] for sample in ours]
    assert all({name: sample[name] for name in mine} == mine for sample, mine in zip(theirs, ours))
