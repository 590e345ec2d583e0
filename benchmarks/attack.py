"""Files of strangers that want memory, other files or secrets, each in a process of its own: is it held, at what cost?

    python benchmarks/attack.py [--only FRAGMENT] [--quick]

The attacks: benchmarks/attack_parts/cases.py. One is held when its source is packed with `--on-bad skip`, the bad part
is one line in quarantine (or the source is refused in one line), all good samples are there, nothing private is shown,
and the process had at most 1 GB more memory resident than one that packed a source of the same kind without it.

A line per attack: whether it was held, MB above the clean run, seconds, what was said. The last line is one JSON
object: machine, `attacks`, `held`, `peak_mb_above_clean`. Exit code 1 when one was not held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from attack_parts import cases, clips, robots, victim

MOST_MB = 1000
"""Above a clean run."""
LONGEST_S = 300
ADDRESSES = 16 << 30  # bytes of address space of a process: one that is not held must not take the machine along
SEVERAL = 2  # at a time


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: KIND: WHAT.
        deed: what is done with the source, a function of `victim`.
        make: writes it below a new folder; gives its location.
        says: in the one line that is said of it; None: it is to be packed.
        samples: that are packed nevertheless.
        clean: the name of the run whose memory it is compared with.
    """

    name: str
    deed: str
    make: Callable[[Path], Path]
    says: str | None
    samples: int | None
    clean: str


def attacks() -> list[Attack]:
    """All of them; those whose name begins with "clean" are what the others are compared with."""
    signed = clips.line({"path": "AFAR/good.mp4", "end": 0.8})
    found = [
        Attack("clean: rows", "pack_source", _rows(), None, 1, "clean: rows"),
        Attack("clean: tars", "pack_source", _tar(b""), None, 2, "clean: tars"),
        Attack("clean: robots", "pack_source", _robot(lambda root: None), None, None, "clean: robots"),
        Attack("clean: shards", "verify_shards", _shards({}), None, 1, "clean: shards"),
        Attack("clean: afar", "pack_from_afar", _rows(signed), None, 2, "clean: afar"),
    ]

    def add(
        part: str, table: dict, clean: str, deed: str, make: Callable, samples: Callable[[str], int | None]
    ) -> None:
        for name, (content, says) in table.items():
            found.append(Attack(f"{part}: {name}", deed, make(content), says, samples(says), f"clean: {clean}"))

    for part in ("guessed", "nonsense", "elsewhere", "large"):
        add(part, getattr(cases, part.upper()), "rows", "pack_source", _rows, lambda says: 1)
    accepted = {name: (row, None) for name, row in cases.ACCEPTED.items()}
    add("large", accepted, "rows", "pack_source", _rows, lambda says: None)
    # Whether a header that cannot be read is of the sample before, nobody knows.
    add("tar", cases.ENTRIES, "tars", "pack_source", _tar, lambda says: 2 - ("headers of a member" in says))
    add("robot", cases.EPISODES, "robots", "pack_source", _robot, lambda says: None)
    add("robot", cases.TABLES, "robots", "pack_source", _robot, lambda says: None)
    add("robot", cases.DATASETS, "robots", "pack_source", _robot, lambda says: 0)
    add("shards", MEMBERS, "shards", "verify_shards", _shards, lambda says: 0)
    add("afar", AFAR, "afar", "pack_from_afar", _rows, lambda says: 1)
    return found


MEMBERS = {
    "a list of files": ({"mp4": b"ffconcat version 1.0\nfile private.mp4\n"}, "no mp4 file as its name says"),
    "billions of frames": ({"mp4": clips.promised_frames(2**32 - 1)}, "data.limits.frames"),
    "an exabyte": ({"context.npy": victim.array_header("(1152921504606846976, 3)")}, "holds 0 bytes of data"),
    "deep JSON": ({"json": clips.nested(100_000).encode()}, "is nested deeper than 32"),
    "400 digits": ({"json": b'{"text": "x", "captions": %s}' % (b"1" * 400)}, "has captions of a wrong type"),
}
AFAR = {
    "file://": (clips.address("file"), "leads out of the folder"),
    "a signed file that is not there": (clips.line({"path": "AFAR/none.mp4"}), "none.mp4: cannot be read"),
    "a signed text": (clips.line({"path": "AFAR/manifest.jsonl"}), "is no video or image by its name"),
    "a signed address of another kind": (clips.line({"path": "memory://user:S3CR3T@a/b.mp4?S3CR3T"}), "allowed_roots"),
}
QUICK = (
    *("guessed: a list of files", "guessed: a session", "nonsense: deep JSON", "nonsense: 400 digits of a score"),
    *("nonsense: 300 characters of a name", "elsewhere: file://", "elsewhere: a linked folder", "elsewhere: a chain"),
    *("large: a few million frames", "large: billions of frames", "large: a huge image", "large: many lists"),
    *("tar: a sparse member", "tar: an exabyte", "tar: descriptions in a row", "robot: a long vector"),
    *("robot: equal texts", "robot: a list of equal texts", "robot: deep JSON", "shards: an exabyte"),
    *("robot: a last timestamp that is no number", "afar: file://", "afar: a signed file that is not there"),
)


def _rows(*rows: clips.Row) -> Callable[[Path], Path]:
    return lambda home: clips.manifest(home / "set", rows)


def _tar(entries: bytes) -> Callable[[Path], Path]:
    def make(home: Path) -> Path:
        (home / "set").mkdir()
        return clips.tar(home / "set/a.tar", entries)

    return make


def _robot(damage: robots.Damage) -> Callable[[Path], Path]:
    return lambda home: robots.dataset(home / "set", damage)


def _shards(members: dict[str, bytes]) -> Callable[[Path], Path]:
    def make(home: Path) -> Path:
        victim.pack_source(clips.manifest(home / "set", ()), home / "shards")
        victim.spoil_shards(home / "shards", members)
        return home / "shards"

    return make


# --- running ---


@dataclass(frozen=True)
class Outcome:
    """What came of an attack; `fault`: why it was not held, or nothing."""

    attack: Attack
    peak_mb: float
    seconds: float
    said: str
    fault: str


def play(attack: Attack, home: Path) -> Outcome:
    """Make a source and let a process of its own have it."""
    home.mkdir()
    source = attack.make(home)
    command = [sys.executable, __file__, "--one", attack.deed, str(source), str(home / "out")]
    begin = time.monotonic()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S, preexec_fn=_bounded)
    except subprocess.TimeoutExpired:
        return Outcome(attack, 0.0, LONGEST_S, "", "has no end")
    seconds = time.monotonic() - begin
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        last = (done.stderr.splitlines() or ["nothing"])[-1]
        return Outcome(attack, 0.0, seconds, last, f"ended with {done.returncode}")
    found = json.loads(lines[-1])
    said = [*found["lines"], *([found["error"]] if found["error"] else [])]
    return Outcome(attack, found["peak_kb"] / 1e3, seconds, "; ".join(said), _fault(attack, found, said))


def _fault(attack: Attack, found: dict, said: list[str]) -> str:
    if found["private"]:
        return "shows what is private"
    if len(said) != (attack.says is not None) or any("\n" in line for line in said):
        return f"is told in {len(said)} lines"
    if attack.says is not None and not re.search(attack.says, said[0]):
        return f"is not told as {attack.says!r}"
    if attack.samples is not None and found["samples"] != attack.samples:
        return f"leaves {found['samples']} samples of {attack.samples}"
    return ""


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))


def _one(deed: str, source: str, out: str) -> int:
    found = getattr(victim, deed)(Path(source), Path(out))
    print(json.dumps(found | {"peak_kb": victim.peak_kb()}))
    return 0


def main() -> int:
    """Run, print, and say by the exit code whether all were held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="FRAGMENT", help="attacks whose name has that in it")
    parser.add_argument("--quick", action="store_true", help="some of every kind, in less than a minute")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return _one(*args.one)
    chosen = [a for a in attacks() if not args.quick or a.name in QUICK or a.name.startswith("clean")]
    chosen = [a for a in chosen if args.only in a.name or a.name.startswith("clean")]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(machine)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="attack-") as folder, ThreadPoolExecutor(SEVERAL) as pool:
        homes = [Path(folder) / str(number) for number in range(len(chosen))]
        clean: dict[str, float] = {}
        worst, held, count = 0.0, 0, 0
        for outcome in pool.map(play, chosen, homes):
            attack = outcome.attack
            if attack.name == attack.clean:
                assert not outcome.fault, f"{attack.name}: {outcome.fault}: {outcome.said}"
                clean[attack.name] = outcome.peak_mb
                continue
            above = max(outcome.peak_mb - clean[attack.clean], 0.0)
            fault = outcome.fault or ("" if above <= MOST_MB else "takes more memory")
            worst, held, count = max(worst, above), held + (not fault), count + 1
            verdict = "held" if not fault else f"NOT HELD, {fault}"
            print(
                f"{attack.name}: {verdict}: +{above:.0f} MB, {outcome.seconds:.1f} s: {outcome.said[-160:]}", flush=True
            )
    result = {"machine": machine, "attacks": count, "held": held, "peak_mb_above_clean": round(worst, 1)}
    print(json.dumps(result | {"seconds": round(time.monotonic() - begin, 1)}))
    return 0 if held == count else 1


if __name__ == "__main__":
    sys.exit(main())
