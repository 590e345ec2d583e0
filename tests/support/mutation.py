"""Runs a register of mutants (`tests/mutants.py`): every changed line must make the test that is named for it fail.

The tree is copied once for each job. There a process that has imported the third-party packages, and nothing of this
project, forks for every run of a test: the tree as it is first, which must pass, then one mutant after another.

A mutant is killed when its test runs and fails. A test that cannot be collected or set up, or that ends in a missing
name or import, says nothing about what the test sees, and is an error, as is a fragment that is no longer in its file
exactly once. What skips the test (it needs reference vectors, say) leaves its mutants out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing as mp
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WARM = (
    *(
        "pytest",
        "pytest_timeout",
        "_hypothesis_pytestplugin",
        "hypothesis.strategies",
        "numpy",
        "pdb",
        "torch",
        "torch._dynamo",
        "torch.distributed",
    ),
    *("safetensors.torch", "omegaconf", "hydra", "webdataset", "av", "pyarrow.parquet", "deepspeed", "megatron.core"),
)
"""What takes long to import, and is not ours."""

LIMIT = 300
"""Seconds after which a test is ended from outside; pytest's own limit comes before."""

BROKEN = re.compile(r"\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError): \S")
"""The last words of a program that is not another one, but none."""


@dataclass(frozen=True)
class Mutant:
    """One changed line.

    Attributes:
        area: heading that it is counted under.
        name: what is wrong with it, in words; unique.
        file: from the root of the repository.
        old: a piece of one line that is in the file exactly once.
        new: what stands there instead.
        test: the pytest node that fails then.
    """

    area: str
    name: str
    file: str
    old: str
    new: str
    test: str

    def applied(self, text: str) -> str:
        """The changed file.

        Raises:
            ValueError: `old` is not in it exactly once, or the result is no Python.
        """
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {count} times in {self.file}, not once")
        changed = text.replace(self.old, self.new)
        if self.file.endswith(".py"):
            try:
                compile(changed, self.file, "exec")
            except SyntaxError as error:
                raise ValueError(f"{self.name}: {self.file} is no Python any more: {error}") from error
        return changed


def faults(register: Sequence[Mutant]) -> list[str]:
    """What is wrong with the register itself: mutants that do not apply, tests that are not there, doubles."""
    found = []
    for name in sorted({m.name for m in register if [other.name for other in register].count(m.name) > 1}):
        found.append(f"{name}: two mutants have this name")
    for mutant in register:
        path, _, function = mutant.test.partition("::")
        tests = ROOT / path
        if not tests.is_file() or f"\ndef {function.partition('[')[0]}(" not in tests.read_text():
            found.append(f"{mutant.name}: there is no test {mutant.test}")
        if not (ROOT / mutant.file).is_file():
            found.append(f"{mutant.name}: there is no file {mutant.file}")
            continue
        if "\n" in mutant.old or mutant.old == mutant.new:
            found.append(f"{mutant.name}: changes no line, or more than one")
        try:
            mutant.applied((ROOT / mutant.file).read_text())
        except ValueError as error:
            found.append(str(error))
    return found


@dataclass(frozen=True)
class Verdict:
    """What came of one run of a test.

    Attributes:
        outcome: "killed", "survived", "error" or "skipped".
        seconds: that it took.
        words: of pytest, about a failure.
        by: the node that failed.
    """

    outcome: str
    seconds: float = 0.0
    words: str = ""
    by: str = ""


# --- the process that has the imports ---


class Recorder:
    """A pytest plugin: which phases of which tests failed."""

    def __init__(self) -> None:
        self.passed, self.failed, self.broken, self.node, self.skipped = 0, "", "", "", ""

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.broken = self.broken or report.longreprtext

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and report.when == "call":
            self.failed, self.node = self.failed or report.longreprtext, self.node or report.nodeid
        elif report.failed:
            self.broken = self.broken or report.longreprtext
        elif report.passed and report.when == "call":
            self.passed += 1
        elif report.skipped:
            self.skipped = report.longreprtext

    def verdict(self) -> tuple[str, str, str]:
        """Outcome, words and the node that failed."""
        if self.failed and not BROKEN.search(self.failed):
            return "killed", self.failed, self.node
        if self.failed or self.broken:
            return "error", self.failed or self.broken, self.node
        if self.passed:
            return "survived", "", ""
        return ("skipped", self.skipped, "") if self.skipped else ("error", "no test has run", "")


def serve() -> None:
    """Answer requests, one JSON line each, in the working directory: tests, and optionally a file and its new text."""
    answers = os.fdopen(os.dup(1), "w")
    log = os.open("../log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for module in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        with _written(request.get("file"), request.get("text")):
            begin = time.monotonic()
            outcome, *words = _forked(request["tests"])
        print(json.dumps([outcome, time.monotonic() - begin, *words]), file=answers, flush=True)


@contextlib.contextmanager
def _written(file: str | None, text: str | None) -> Iterator[None]:
    if file is None:
        yield
        return
    path = Path(file)
    before = path.read_bytes()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_bytes(before)


def _forked(tests: list[str]) -> tuple[str, ...]:
    """Run tests, up to the first that fails, in a fork of this process; what it leaves running is ended."""
    answer = Path("../answer")
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            _run(tests, answer)
        finally:
            os._exit(0)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(pid, signal.SIGKILL))
    signal.alarm(LIMIT)
    _, status = os.waitpid(pid, 0)
    signal.alarm(0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not answer.is_file():
        return "error", f"the process of the test has ended without a result (status {status})"
    return tuple(json.loads(answer.read_text()))


def _run(tests: list[str], answer: Path) -> None:
    import pytest
    from hypothesis import Phase, settings
    from support import pool

    # The ranks of a distributed test are forked from here, which has the imports, and not from one more process.
    pool._forkserver = lambda: mp.get_context("fork")
    # Who fails is known by the first example; a smaller one would be for people.
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    # Looking for plugins would take longer than most tests.
    plugins = ["--disable-plugin-autoload", "-p", "pytest_timeout", "-p", "_hypothesis_pytestplugin"]
    options = ["-x", "--basetemp=../temporary", "--hypothesis-seed=0"]
    recorder = Recorder()
    pytest.main([*tests, *plugins, *options], plugins=[recorder])
    answer.write_text(json.dumps(recorder.verdict()))


# --- the process that asks ---


class Job:
    """A copy of the tree and the process that runs tests there."""

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self._tree = tree = folder / "tree"
        for name in files:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        if (ROOT.parent / "shared").is_dir():
            (folder / "shared").symlink_to(ROOT.parent / "shared")
        # No compiled files are written: one of a mutant would be taken for the file's own, which has the same size and
        # second. Those made here hold a hash of their source and are passed over when it differs.
        packages = [str(tree / name) for name in sorted({name.split("/")[0] for name in files if name.endswith(".py")})]
        compiled = ["-m", "compileall", "-q", "--invalidation-mode", "checked-hash", *packages]
        subprocess.run([sys.executable, *compiled], check=True)
        paths = os.pathsep.join([str(tree), str(tree / "tests")])
        settings = {
            "PYTHONPATH": paths,
            "PYTHONDONTWRITEBYTECODE": "1",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from support.mutation import serve; serve()"],
            **{"cwd": tree, "env": {**os.environ, **settings}, "text": True},
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        )

    def run(self, *tests: str, mutant: Mutant | None = None) -> Verdict:
        """The verdict of tests on the tree, or on a mutant of it."""
        request: dict[str, Any] = {"tests": tests}
        if mutant is not None:
            request |= {"file": mutant.file, "text": mutant.applied((self._tree / mutant.file).read_text())}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that runs the tests has ended")
        return Verdict(*json.loads(line))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def tracked_files() -> list[str]:
    """Of the repository, those not committed yet included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def run_all(register: Sequence[Mutant], *, jobs: int) -> dict[Mutant, Verdict]:
    """Every mutant's verdict; said as they come."""
    by_test: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in register:
        by_test[mutant.test].append(mutant)
    waiting: SimpleQueue[str] = SimpleQueue()
    for test in sorted(by_test, key=lambda test: -len(by_test[test])):
        waiting.put(test)
    verdicts: dict[Mutant, Verdict] = {}

    def work(folder: Path) -> None:
        job = Job(folder, files)
        with contextlib.suppress(Empty):
            while test := waiting.get_nowait():
                clean = job.run(test)
                if clean.outcome in ("killed", "error"):
                    clean = Verdict("error", clean.seconds, f"without a mutant {test} does not pass:\n{clean.words}")
                for mutant in by_test[test]:
                    verdicts[mutant] = job.run(test, mutant=mutant) if clean.outcome == "survived" else clean
                    _say(mutant, verdicts[mutant])
        job.close()

    files = tracked_files()
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary, ThreadPoolExecutor(jobs) as pool:
        folders = [Path(temporary) / f"job{i}" for i in range(jobs)]
        for done in [pool.submit(work, folder) for folder in folders]:
            done.result()
    return {mutant: verdicts[mutant] for mutant in register}


def _say(mutant: Mutant, verdict: Verdict) -> None:
    print(f"{verdict.outcome:8} {verdict.seconds:6.1f} s  {mutant.area}: {mutant.name}", flush=True)


def summary(verdicts: dict[Mutant, Verdict]) -> str:
    """A table by area, what is not killed, and the counts."""
    lines = [f"{'area':24} {'killed':>6} {'registered':>10} {'seconds':>8}"]
    for area in [*dict.fromkeys(m.area for m in verdicts), "all"]:
        of_area = [v for m, v in verdicts.items() if area in (m.area, "all")]
        killed, seconds = sum(v.outcome == "killed" for v in of_area), sum(v.seconds for v in of_area)
        lines.append(f"{area:24} {killed:6} {len(of_area):10} {seconds:8.1f}")
    for mutant, verdict in verdicts.items():
        if verdict.outcome != "killed":
            lines += ["", f"{verdict.outcome}: {mutant.area}: {mutant.name}", f"    {mutant.file}: {mutant.old}"]
            lines += [f"    → {mutant.new}", f"    {mutant.test}"]
            lines += [f"    | {line}" for line in verdict.words.splitlines()[-12:]]
    outcomes = Counter(verdict.outcome for verdict in verdicts.values())
    others = "".join(f", {outcomes[name]} {name}" for name in ("survived", "error", "skipped") if outcomes[name])
    return "\n".join([*lines, "", f"{outcomes['killed']} killed of {len(verdicts)} registered{others}"])


def main(register: Sequence[Mutant]) -> int:
    """Run the register, or a part of it. Returns the exit code: 1 with survivors, 2 where mutants do not apply."""
    parser = argparse.ArgumentParser(description="Run every mutant against the test that must kill it.")
    parser.add_argument("--only", metavar="PATTERN", default="", help="regular expression on area, name, file and test")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time, each in a copy of the tree")
    arguments = parser.parse_args()
    chosen = [m for m in register if re.search(arguments.only, f"{m.area}: {m.name} {m.file} {m.test}")]
    if wrong := faults(chosen) or ([] if chosen else [f"--only {arguments.only}: no mutant is called so"]):
        print("\n".join(wrong), file=sys.stderr)
        return 2
    verdicts = run_all(chosen, jobs=min(arguments.jobs, len({m.test for m in chosen})))
    print(f"\n{summary(verdicts)}")
    return int(any(v.outcome in ("survived", "error") for v in verdicts.values()))
