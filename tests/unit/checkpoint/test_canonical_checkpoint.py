"""The canonical checkpoint on disk: what survives writing, killing, damage and pruning."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.killed_writer import kill_among_files

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import describe_file
from kairos_train.checkpoint import canonical
from kairos_train.checkpoint.canonical import CheckpointReader, find_latest
from kairos_train.checkpoint.intact import find_intact
from kairos_train.checkpoint.retention import prune
from kairos_train.checkpoint.writing import write_checkpoint
from parallel.topology import Topology


def make_sections(scale: float = 1.0) -> dict:
    rng = torch.Generator().manual_seed(3)
    whole = torch.randn(6, 5, 4, generator=rng) * scale
    return {
        "model": {
            "video_dit.blocks.0.weight": whole,
            "video_dit.blocks.0.view": whole[:, 2],
            "scalar": torch.tensor(-0.0),
            "half": torch.randn(7, 3, generator=rng).to(torch.bfloat16),
            "empty": torch.empty(0, 3),
        },
        "rng": {"torch": torch.arange(200, dtype=torch.uint8)},
    }


def write(parent: Path, step: int = 40, scale: float = 1.0, **kwargs) -> Path:
    state = {"loader": {"cursor": [1, 2]}, "loss": 0.1}
    return write_checkpoint(
        parent, step, sections=make_sections(scale), state=state, files={"config.yaml": "seed: 0\n"}, **kwargs
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path):
    path = write(tmp_path)
    reader = CheckpointReader(path)
    assert path.name == "step-00000040"
    assert reader.step == 40
    assert reader.state == {"loader": {"cursor": [1, 2]}, "loss": 0.1}
    assert reader.text("config.yaml") == "seed: 0\n"
    assert reader.sections() == ["model", "rng"]
    for section, tensors in make_sections().items():
        read = reader.read_section(section)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            bits = (tensor.view(torch.int16), read[name].view(torch.int16)) if name == "half" else (tensor, read[name])
            assert read[name].dtype == tensor.dtype
            assert same_bits(*bits), name
    reader.verify()


def test_files_are_split_at_the_size_limit(tmp_path):
    path = write(tmp_path, file_bytes=300)
    sizes = {name: info["bytes"] for name, info in CheckpointReader(path).manifest["files"].items()}
    assert sum(name.startswith("model-") for name in sizes) > 1
    assert torch.equal(CheckpointReader(path).read("model", "half"), make_sections()["model"]["half"])


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced, sync = {}, os.fsync

    def recording(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced[path.name] = (path.stat().st_size, (tmp_path / "step-00000003").exists())
        sync(handle)

    monkeypatch.setattr(os, "fsync", recording)
    folder = write(tmp_path, 3, file_bytes=300)
    sizes = {path.name: (path.stat().st_size, False) for path in folder.iterdir()}
    assert len(sizes) > 4
    assert {name: synced.get(name) for name in sizes} == sizes
    assert [there for name, (_, there) in synced.items() if name.startswith(".tmp-step-")] == [False]  # its names
    assert synced[tmp_path.name][1]  # its own


def test_a_slice_is_read_alone(tmp_path):
    reader = CheckpointReader(write(tmp_path))
    whole = make_sections()["model"]["video_dit.blocks.0.weight"]
    box = (slice(1, 5), slice(None), slice(-2, None))
    assert torch.equal(reader.read("model", "video_dit.blocks.0.weight", box), whole[box])
    assert torch.equal(reader.read("model", "video_dit.blocks.0.weight", (slice(2, 2),)), whole[2:2])
    with pytest.raises(ValueError, match="step of 1"):
        reader.read("model", "video_dit.blocks.0.weight", (slice(0, 4, 2),))


def write_pieces(parent: Path, whole: torch.Tensor, boxes: list[tuple[slice, ...]]) -> Path:
    """A checkpoint as a sharded writer would leave it: one tensor in boxes, one file each."""
    folder = canonical.checkpoint_path(parent, 7)
    folder.mkdir(parents=True)
    pieces, files = [], {}
    for number, box in enumerate(boxes):
        name = f"model-{number}.safetensors"
        part = whole[box].clone()
        save_file({"part": part}, folder / name)
        files[name] = describe_file(folder / name)
        offset = [s.indices(n)[0] for s, n in zip(box, whole.shape)]
        pieces.append({"file": name, "key": "part", "offset": offset, "shape": list(part.shape)})
    info = {"dtype": "float32", "shape": list(whole.shape), "pieces": pieces}
    manifest = {"format": canonical.FORMAT, "step": 7, "sections": {"model": {"w": info}}, "state": {}, "files": files}
    manifest["sha256"] = canonical.manifest_digest(manifest)
    (folder / canonical.MANIFEST).write_text(json.dumps(manifest))
    return folder


BOXES = [
    (slice(0, 2), slice(0, 5), slice(0, 4)),
    (slice(2, 6), slice(0, 1), slice(0, 4)),
    (slice(2, 6), slice(1, 5), slice(0, 3)),
    (slice(2, 6), slice(1, 5), slice(3, 4)),
]


def test_pieces_cut_along_any_dimension_are_assembled(tmp_path):
    whole = torch.randn(6, 5, 4)
    reader = CheckpointReader(write_pieces(tmp_path, whole, BOXES))
    reader.verify()
    assert torch.equal(reader.read("model", "w"), whole)
    for box in ((slice(1, 3), slice(0, 2), slice(2, 4)), (slice(3, 6), slice(2, 3)), (slice(0, 6), slice(4, 5))):
        assert torch.equal(reader.read("model", "w", box), whole[box])


def test_pieces_that_leave_a_hole_are_refused(tmp_path):
    reader = CheckpointReader(write_pieces(tmp_path, torch.randn(6, 5, 4), BOXES[:-1]))
    with pytest.raises(UserError, match="do not cover"):
        reader.read("model", "w")
    with pytest.raises(UserError, match="do not tile"):
        reader.verify()


def test_overlapping_pieces_are_found_by_verify(tmp_path):
    boxes = [(slice(0, 4),), (slice(0, 4),), (slice(4, 8),)]
    with pytest.raises(UserError, match="do not tile"):
        CheckpointReader(write_pieces(tmp_path, torch.randn(12), boxes)).verify()


def test_an_existing_step_is_never_overwritten_with_other_content(tmp_path):
    path = write(tmp_path)
    before = (path / "manifest.json").stat().st_mtime_ns
    assert write(tmp_path) == path  # identical: left alone
    assert (path / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="never overwritten"):
        write(tmp_path, scale=2.0)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_damaged_step_is_replaced(tmp_path):
    path = write(tmp_path)
    flip_bit(path / "model-00000-00001.safetensors", -1)
    write(tmp_path, scale=2.0)
    reader = CheckpointReader(path)
    reader.verify()
    assert torch.equal(reader.read("model", "half"), make_sections(2.0)["model"]["half"])


@pytest.mark.parametrize(
    "name", ["model-00000-00001.safetensors", "rng-00000-00001.safetensors", "config.yaml", "manifest.json"]
)
def test_one_flipped_bit_is_found_and_its_file_named(tmp_path, name):
    path = write(tmp_path)
    flip_bit(path / name, 2 if name == "config.yaml" else -20)
    with pytest.raises(UserError, match=name):
        CheckpointReader(path).verify()


def test_a_manifest_that_still_parses_is_protected_as_well(tmp_path):
    path = write(tmp_path)
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"loss": 0.1', '"loss": 0.3'))
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        CheckpointReader(path)
    assert find_latest(tmp_path)[0] is None


def test_find_latest_passes_over_truncated_missing_and_foreign_checkpoints(tmp_path):
    good = write(tmp_path, 10)
    truncated, missing, foreign = write(tmp_path, 20), write(tmp_path, 30), write(tmp_path, 40)
    with open(truncated / "model-00000-00001.safetensors", "r+b") as file:
        file.truncate(100)
    (missing / "config.yaml").unlink()
    (foreign / "manifest.json").write_text('{"format": "other"}')
    (tmp_path / "step-00000050").mkdir()
    (tmp_path / "step-00000060").write_text("")
    (tmp_path / "step-latest").mkdir()
    found, warnings = find_latest(tmp_path)
    assert found == good
    assert len(warnings) == 5
    for warning, reason in zip(warnings, ["no manifest", "no manifest", "'other'", "config.yaml is missing", "bytes"]):
        assert reason in warning


def test_find_latest_reads_every_byte_of_weights_only_when_asked(tmp_path):
    old, new = write(tmp_path, 10), write(tmp_path, 20)
    flip_bit(new / "model-00000-00001.safetensors", -1)
    assert find_latest(tmp_path) == (new, [])
    found, warnings = find_latest(tmp_path, deep=True)
    assert found == old
    assert "model-00000-00001.safetensors is damaged" in warnings[0]


def test_a_file_that_has_grown_is_another_file(tmp_path):
    path = write(tmp_path, 10)
    with open(path / "config.yaml", "a") as file:
        file.write("\n")
    assert canonical.find_problem(path) == "config.yaml has 9 bytes, not 8"


def test_steps_are_ordered_as_numbers_and_names_must_tell_the_manifests(tmp_path):
    """Beyond eight digits names do not sort."""
    old, new = write(tmp_path, 99_999_999), write(tmp_path, 100_000_000)
    for name in ("7", "00000007", "step-x", "step-", "steps-7"):
        (tmp_path / name).mkdir()
    assert canonical.list_checkpoints(tmp_path) == [old, new]
    assert find_latest(tmp_path)[0] == new
    new.rename(canonical.checkpoint_path(tmp_path, 100_000_001))
    found, (warning,) = find_latest(tmp_path)
    assert found == old
    assert "manifest.json is of step 100000000" in warning


@pytest.mark.parametrize("name", ["model-00000-00001.safetensors", "rng-00000-00001.safetensors"])
def test_ranks_that_share_the_bytes_find_the_damage_between_them(tmp_path, name):
    path = write(tmp_path)
    flip_bit(path / name, -20)
    found = [canonical.find_problem(path, deep=True, share=(rank, 3)) for rank in range(3)]
    number = sorted(json.loads((path / "manifest.json").read_text())["files"]).index(name)
    assert [problem is not None for problem in found] == [rank == number for rank in range(3)]
    assert name in found[number]


def test_the_newest_intact_checkpoint_before_a_step_is_found_by_its_bytes(tmp_path):
    alone, paths = Topology.single(torch.device("cpu")), {step: write(tmp_path, step) for step in (10, 20, 30, 40)}
    flip_bit(paths[30] / "model-00000-00001.safetensors", -1)
    assert find_intact(tmp_path, alone) == (paths[40], [])
    found, (warning,) = find_intact(tmp_path, alone, before=40)
    assert found == paths[20]
    assert "step-00000030 is skipped: model-00000-00001.safetensors is damaged" in warning
    assert find_intact(tmp_path, alone, before=20)[0] == paths[10]
    assert find_intact(tmp_path, alone, before=10) == (None, [])


def test_find_latest_of_a_run_without_checkpoints_is_none(tmp_path):
    assert find_latest(tmp_path / "absent") == (None, [])


WRITER = """
import sys, torch
from pathlib import Path
from kairos_train.checkpoint.writing import write_checkpoint
sections = {"model": {f"w{i}": torch.full((256, 1024), float(i)) for i in range(400)}}
print("ready", flush=True)
write_checkpoint(Path(sys.argv[1]), 2, sections=sections, state={}, files={}, file_bytes=2**20)
"""


def test_a_writer_killed_half_way_leaves_no_visible_checkpoint(tmp_path):
    first = write(tmp_path, 1)
    kill_among_files(WRITER, tmp_path, after=5)  # of 400
    assert list(tmp_path.glob(".tmp-*"))
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".tmp-")] == [first.name]
    assert find_latest(tmp_path, deep=True) == (first, [])
    second = write(tmp_path, 2)
    assert not list(tmp_path.glob(".tmp-*")), "the next writer cleans up"
    assert find_latest(tmp_path) == (second, [])


def test_state_that_json_cannot_keep_is_refused_and_leaves_nothing(tmp_path):
    for state in ({"loss": float("nan")}, {"rng": b"bytes"}):
        with pytest.raises((ValueError, TypeError)):
            write_checkpoint(tmp_path, 1, sections={}, state=state, files={})
    assert not list(tmp_path.iterdir())


def test_missing_section_and_tensor_are_named(tmp_path):
    reader = CheckpointReader(write(tmp_path))
    with pytest.raises(UserError, match="no section 'ema'"):
        reader.read_section("ema")
    with pytest.raises(UserError, match="no tensor 'absent'"):
        reader.read("model", "absent")


def test_prune_keeps_the_last_and_every_nth_and_never_counts_damaged_ones(tmp_path):
    paths = {step: write(tmp_path, step) for step in (10, 20, 30, 40, 50, 60)}
    (paths[60] / "config.yaml").unlink()
    removed, (left,) = prune(tmp_path, keep_last=2, keep_every=20)
    assert removed == [paths[10], paths[30]]
    assert left == f"checkpoint {paths[60]} is left as it is: config.yaml is missing"
    assert sorted(p.name for p in tmp_path.iterdir()) == [paths[step].name for step in (20, 40, 50, 60)]
    assert find_latest(tmp_path)[0] == paths[50]
    assert prune(tmp_path, keep_last=1, keep_every=0, keep=[20])[0] == [paths[40]]
    assert prune(tmp_path, keep_last=1, keep_every=0)[0] == [paths[20]]


def test_prune_refuses_to_keep_nothing(tmp_path):
    with pytest.raises(UserError, match="keep_last=0"):
        prune(tmp_path, keep_last=0, keep_every=0)
