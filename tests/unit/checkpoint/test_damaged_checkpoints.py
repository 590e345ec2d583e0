"""Checkpoints that cannot be read, whatever the reason: skipped, left as they are, never taken in silence."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kairos_train.basics.errors import MachineFault, UserError
from kairos_train.checkpoint import canonical
from kairos_train.checkpoint.canonical import MANIFEST, CheckpointReader, find_latest, find_problem
from kairos_train.checkpoint.intact import find_intact
from kairos_train.checkpoint.resolve import resolve_best, resolve_checkpoint
from kairos_train.checkpoint.retention import prune
from kairos_train.checkpoint.writing import remove_leftovers, write_checkpoint
from kairos_train.config.operation_schema import GuardConfig
from kairos_train.operations.guard import Guard
from kairos_train.training.rollback import last_good
from parallel.topology import Topology

ALONE = Topology.single(torch.device("cpu"))
WEIGHTS = "model-00000-00001.safetensors"
ERRORS = {errno.EIO: "Input/output error", errno.ESTALE: "Stale file handle", errno.EACCES: "Permission denied"}


def write(parent: Path, step: int, fill: float = 0.0) -> Path:
    sections = {"model": {"w": torch.full((4, 3), fill), "b": torch.zeros(3, dtype=torch.bfloat16)}}
    state = {"best": {"step": 10, "loss": 0.5}}
    return write_checkpoint(parent, step, sections=sections, state=state, files={"config.yaml": "seed: 0\n"})


Damage = Callable[[Path], None]


def instead(name: str, make: Damage) -> Damage:
    """Something else under a file's name; "." is the checkpoint itself."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / name
        path.rename(checkpoint.parent / "was")
        make(path)

    return damage


def content(text: str) -> Damage:
    return instead(MANIFEST, lambda path: path.write_text(text))


def edited(change: Callable[[dict], object]) -> Damage:
    """Another manifest whose digest is right: not damaged, made so."""

    def damage(checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        change(manifest)
        manifest["sha256"] = canonical.manifest_digest(manifest)
        (checkpoint / MANIFEST).write_text(canonical.to_json(manifest))

    return damage


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def described(manifest: dict) -> dict:
    return manifest["sections"]["model"]["w"]


UNREADABLE = {
    "the manifest is a folder": (instead(MANIFEST, Path.mkdir), "manifest.json cannot be read"),
    "the manifest is a pipe": (instead(MANIFEST, os.mkfifo), "manifest.json cannot be read"),
    "the manifest links to itself": (instead(MANIFEST, loop), "manifest.json cannot be read .Too many levels"),
    "the manifest links nowhere": (instead(MANIFEST, lambda path: path.symlink_to("gone")), "has no manifest.json"),
    "the manifest nests deep": (content('{"state":' * 200_000), "manifest.json is not readable"),
    "the manifest is an array": (content("[" * 100_000 + "]" * 100_000), "manifest.json is not readable"),
    "the manifest has a key twice": (content('{"format": "a", "format": "b"}'), "manifest.json is not readable"),
    "the manifest has NaN": (content('{"format": "kairos-checkpoint-1", "a": NaN}'), "manifest.json is not readable"),
    "the weights are a folder": (instead(WEIGHTS, Path.mkdir), f"{WEIGHTS} cannot be read"),
    "the weights are a pipe": (instead(WEIGHTS, os.mkfifo), f"{WEIGHTS} cannot be read"),
    "the weights link to themselves": (instead(WEIGHTS, loop), f"{WEIGHTS} cannot be read"),
    "a text links to itself": (instead("config.yaml", loop), "config.yaml cannot be read"),
    "a text has another byte": (instead("config.yaml", lambda p: p.write_text("seed: 1\n")), "config.yaml is damaged"),
    "the folder is a file": (instead(".", Path.touch), "has no manifest.json"),
    "the folder links to itself": (instead(".", loop), "manifest.json cannot be read"),
    "the step is a word": (edited(lambda m: m.update(step="20")), "has no 'step'"),
    "there is no state": (edited(lambda m: m.pop("state")), "has no 'state'"),
    "there are no sections": (edited(lambda m: m.update(sections=[])), "has no 'sections'"),
    "a file lies above": (edited(lambda m: m["files"].update({"../x": m["files"][WEIGHTS]})), "has no 'files'"),
    "a file lies at the root": (edited(lambda m: m["files"].update({"/etc/x": m["files"][WEIGHTS]})), "has no 'files'"),
    "a file is the folder above": (edited(lambda m: m["files"].update({"..": m["files"][WEIGHTS]})), "has no 'files'"),
    "a file has no digest": (edited(lambda m: m["files"][WEIGHTS].pop("sha256")), "has no 'files'"),
}
MISDESCRIBED = {
    "of an unknown type": lambda m: described(m).update(dtype="float31"),
    "larger than all files": lambda m: described(m).update(shape=[10**12, 3]),
    "larger than its file": lambda m: described(m)["pieces"][0].update(shape=[10**12, 3]),
    "of a size below nothing": lambda m: described(m).update(shape=[-4, -3]),
    "of a truth": lambda m: described(m).update(shape=[True, 3]),
    "of other dimensions": lambda m: described(m)["pieces"][0].update(offset=[0]),
    "in a file elsewhere": lambda m: described(m)["pieces"][0].update(file="../x"),
    "without pieces": lambda m: described(m).pop("pieces"),
    "a word": lambda m: m["sections"]["model"].update(w="x"),
}


@pytest.mark.parametrize(("damage", "problem"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_skipped_and_left_as_it_is(tmp_path, damage, problem):
    good = write(tmp_path, 10)
    damage(write(tmp_path, 20))
    before = sorted(path.name for path in tmp_path.iterdir())
    for found, warnings in (find_latest(tmp_path), find_intact(tmp_path, ALONE)):
        assert found == good
        assert len(warnings) == 1
        assert problem.replace(".Too", "(Too") in warnings[0]
        assert "\n" not in warnings[0]
    newer = [write(tmp_path, step) for step in (30, 40)]
    removed, left = prune(tmp_path, keep_last=2, keep_every=0)
    assert removed == [good]
    (warning,) = left
    assert "step-00000020 is left as it is: " in warning
    assert sorted({*before, *(path.name for path in newer)} - {good.name}) == sorted(p.name for p in tmp_path.iterdir())


@pytest.mark.parametrize("change", MISDESCRIBED.values(), ids=MISDESCRIBED)
def test_tensors_that_are_not_those_of_the_files_are_never_made(tmp_path, change):
    good, odd = write(tmp_path, 10), write(tmp_path, 20)
    edited(change)(odd)
    problem = "manifest.json does not describe model/w as a tensor of its files"
    with pytest.raises(UserError, match=problem):
        CheckpointReader(odd).read("model", "w")
    found, (warning,) = find_intact(tmp_path, ALONE)
    assert found == good
    assert problem in warning


@pytest.mark.parametrize("number", ERRORS, ids=ERRORS.values())
@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
@pytest.mark.parametrize("when", ["looked at", "read"])
def test_whatever_the_file_system_says_is_no_end(tmp_path, monkeypatch, number, name, when):
    """Errors that nobody can make on purpose here, from the call that would have them."""
    good, bad = write(tmp_path, 10), write(tmp_path, 20)
    stat, digest, opened = os.stat, hashlib.file_digest, open

    def failing(path: object) -> None:
        if str(path) == str(bad / name):
            raise OSError(number, os.strerror(number), str(path))

    if when == "looked at":
        monkeypatch.setattr(os, "stat", lambda path, **how: (failing(path), stat(path, **how))[1])
    else:
        monkeypatch.setattr(hashlib, "file_digest", lambda file, how: (failing(file.name), digest(file, how))[1])
        monkeypatch.setattr("builtins.open", lambda path, *how, **more: (failing(path), opened(path, *how, **more))[1])
    found, (warning,) = find_intact(tmp_path, ALONE)
    assert found == good
    assert f"{name} cannot be read ({ERRORS[number]})" in warning


@pytest.mark.parametrize("make", [Path.touch, loop])
def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_an_empty_one(tmp_path, make):
    make(tmp_path / "checkpoints")
    for look in (find_latest, lambda parent: find_intact(parent, ALONE)):
        with pytest.raises(
            MachineFault, match=r"checkpoints: cannot be listed \(.*\); see to the disk, start it again"
        ):
            look(tmp_path / "checkpoints")
    assert find_latest(tmp_path / "absent") == (None, [])


def test_only_names_that_are_written_are_steps(tmp_path):
    names = ("step-7", "step-٠٠٠٠٠٠٠٧", "step-000000007", "step--0000007", "step-00000007 ", "step-" + 250 * "9")
    assert [canonical.step_of(tmp_path / name) for name in names] == [*5 * [None], int(250 * "9")]


def test_what_cannot_be_removed_stays_and_is_said(tmp_path, monkeypatch):
    paths = [write(tmp_path, step) for step in (10, 20, 30)]
    rename = Path.rename

    def refusing(path: Path, target: Path) -> Path:
        if path == paths[0]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refusing)
    removed, (warning,) = prune(tmp_path, keep_last=1, keep_every=0)
    assert removed == [paths[1]]
    assert "step-00000010 is left as it is: cannot be removed (Permission denied)" in warning
    guard = Guard(GuardConfig(skips=0), tolerant=True)
    write(tmp_path, 1)
    guard.note(2, float("nan"), good=False)
    with pytest.raises(
        MachineFault, match=r"step-00000010: cannot be removed \(Permission denied\), and the run would"
    ):
        last_good(guard, tmp_path, ALONE, where="here")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, loop])
def test_leftovers_of_any_kind_are_removed(tmp_path, make):
    make(tmp_path / ".tmp-removed-step-00000010")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["the manifest is a folder", "the folder is a file", "the folder links to itself"])
def test_what_cannot_be_read_is_replaced_when_its_step_is_written(tmp_path, damage):
    path = write(tmp_path, 10)
    UNREADABLE[damage][0](path)
    assert write(tmp_path, 10, fill=2.0) == path
    assert find_problem(path, deep=True) is None
    assert (CheckpointReader(path).read("model", "w") == 2).all()


def test_an_older_checkpoint_is_taken_by_those_alone_who_name_it(tmp_path):
    old, new = write(tmp_path / "checkpoints", 10), write(tmp_path / "checkpoints", 20)
    assert resolve_checkpoint(tmp_path) == resolve_checkpoint(tmp_path / "checkpoints") == new
    assert resolve_best(tmp_path) == old
    instead(MANIFEST, Path.mkdir)(new)
    for resolve in (resolve_checkpoint, resolve_best):
        with pytest.raises(UserError, match=rf"its newest, step-00000020, is damaged: .*name the older {old} to take"):
            resolve(tmp_path)
        assert resolve(old) == old
    instead(MANIFEST, loop)(old)
    with pytest.raises(UserError, match=r"its newest, step-00000020, is damaged: .*; restore it$"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        CheckpointReader(resolve_checkpoint(old))
