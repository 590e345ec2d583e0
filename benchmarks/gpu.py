"""Conformance and speed on a machine with one GPU: kernels against float64, layers and the training step of the 4 B
video stream against a plain baseline, in one run of bounded time.

    python benchmarks/gpu.py [--budget-minutes 8] [--out FILE.json] [--only SECTION ...]
    python benchmarks/gpu.py --device cpu --tiny        # a look at the script itself: toy sizes, no GPU

Needs torch (2.11 or later) and what is to be compared: flash-linear-attention, flash-attn, Transformer Engine; whatever
is not there is reported as absent. Sections run in the order of their worth, each in at most its time; the JSON file is
rewritten after every entry, so that a run that is cut short leaves what it found. The last line printed is one JSON
object. The exit code is 1 when a conformance check failed or could not be made for a fault.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_sections.harness import Entry, Setting, Worker

from kairos_train.basics.files import write_whole

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Section:
    """One part of the run.

    Attributes:
        name: of the generator in `module`.
        module: where it is.
        seconds: it may take at most.
    """

    name: str
    module: str
    seconds: float

    @property
    def conformance(self) -> bool:
        return self.module == "gpu_sections.conformance"


SECTIONS = (
    Section("gated_delta", "gpu_sections.conformance", 110),
    Section("windows", "gpu_sections.conformance", 40),
    Section("model", "gpu_sections.conformance", 60),
    Section("state_passing", "gpu_sections.conformance", 110),
    Section("step", "gpu_sections.speed", 160),
    Section("blocks", "gpu_sections.speed", 100),
    Section("fp8", "gpu_sections.conformance", 30),
    Section("flex", "gpu_sections.conformance", 100),
    Section("fp8_layers", "gpu_sections.speed", 60),
    Section("compiled", "gpu_sections.speed", 120),
    Section("flex_layers", "gpu_sections.speed", 60),
)
"""In the order of their worth. What a section needs for itself: a few seconds, minutes where kernels are compiled."""

SHORTEST = 10.0
"""Seconds left below which no section begins."""


class GpuReport:
    """What was found, on its way into the file."""

    def __init__(self, path: Path, about: Entry) -> None:
        self.path, self.found = path, {**about, "sections": {}}
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def entry(self, section: str, key: str, entry: Entry) -> None:
        self._section(section)["entries"][key] = entry
        self.write()

    def end(self, section: str, status: str, seconds: float, fault: str | None) -> None:
        self._section(section).update(status=status, seconds=round(seconds, 1), fault=fault)
        self.write()

    def write(self) -> None:
        """Replace the file whole."""
        write_whole(self.path, json.dumps(finite(self.found), indent=1, ensure_ascii=False) + "\n")

    def _section(self, name: str) -> Entry:
        return self.found["sections"].setdefault(name, {"status": "running", "entries": {}})

    def summary(self) -> Entry:
        """The run in a few names and numbers."""
        sections = self.found["sections"]
        entries = [(f"{s}: {key}", e) for s, part in sections.items() for key, e in part["entries"].items()]
        faults = {name: part["fault"] for name, part in sections.items() if part["status"] == "error"}
        measured = [(f"{name}, {who}", e) for name, entry in entries for who, e in entry.items() if isinstance(e, dict)]
        names = {section.name for section in SECTIONS if section.conformance}
        return {
            "out": str(self.path),
            **{key: self.found[key] for key in ("date", "commit", "device", "tiny")},
            "machine": sections.get("machine", {}).get("entries", {}).get("machine", {}),
            "passed": sum(e.get("passed") is True for _, e in entries),
            "failed": [name for name, e in entries if e.get("passed") is False],
            "faults": {**faults, **{name: e["error"] for name, e in measured if "error" in e}},
            "conformance_faults": sorted(names & set(faults)),
            "unfinished": [name for name, part in sections.items() if part["status"] in ("timeout", "skipped")],
            "absent": {name: e["absent"] for name, e in entries if "absent" in e},
            "speedups": {name: round(e["speedup"], 3) for name, e in entries if e.get("speedup")},
            "step": sections.get("step", {}).get("entries", {}).get("video step"),
        }


def finite(value: Any) -> Any:
    """JSON has no infinity: numbers that are not finite become their names."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run(sections: list[Section], setting: Setting, budget: float, report: GpuReport) -> None:
    """All sections that the budget (seconds) has time for."""
    end = time.monotonic() + budget
    worker = Worker()
    for section in (Section("machine", "gpu_sections.harness", 60), *sections):
        left = end - time.monotonic()
        if left < SHORTEST:
            report.end(section.name, "skipped", 0.0, f"{max(left, 0):.0f} s of the budget were left")
            continue
        begin, limited = time.monotonic(), Setting(setting.device, setting.tiny, min(section.seconds, left))

        def on_entry(key: str, entry: Entry, name: str = section.name) -> None:
            report.entry(name, key, entry)
            print(f"  {key}: {brief(entry)}", flush=True)

        print(f"{section.name}", flush=True)
        status, fault = worker.run(section.module, section.name, limited, on_entry)
        report.end(section.name, status, time.monotonic() - begin, fault)
        print(f"  {status} after {time.monotonic() - begin:.1f} s" + (f": {fault}" if fault else ""), flush=True)
    worker.stop()


def brief(entry: Entry) -> str:
    """One entry in one line."""
    if "absent" in entry:
        return f"absent: {entry['absent']}"
    if "errors" in entry:
        worst = max(entry["errors"], key=lambda name: entry["errors"][name] / entry["tolerances"][name])
        verdict = "passed" if entry["passed"] else "FAILED"
        return f"{verdict}, worst {worst} {entry['errors'][worst]:.2e} of {entry['tolerances'][worst]:.0e}"
    subjects = {name: e for name, e in entry.items() if isinstance(e, dict)}
    if not subjects:
        return json.dumps(finite(entry), ensure_ascii=False)
    timed = [f"{name} {1e3 * e['seconds']:.1f} ms" for name, e in subjects.items() if "seconds" in e]
    timed += [f"{name}: {e['error']}" for name, e in subjects.items() if "error" in e]
    faster = [f"{entry['speedup']:.2f} times faster"] if entry.get("speedup") else []
    return "; ".join(timed + faster) or "warmed up"


def commit() -> str:
    """Of the checkout; "unknown" where there is none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def main() -> int:
    """Run and print."""
    names = [section.name for section in SECTIONS]
    today = datetime.date.today().isoformat()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget-minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / f"{today}_gpu.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="SECTION", help=", ".join(names))
    parser.add_argument("--commit", default=commit(), help="where the checkout has no history")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu is for --tiny: full sizes take hours without a GPU")

    sys.path.insert(0, str(ROOT))  # the project need not be installed
    about = {"date": today, "commit": args.commit, "device": args.device, "tiny": args.tiny}
    report = GpuReport(args.out, {**about, "budget_minutes": args.budget_minutes})
    chosen = [section for section in SECTIONS if section.name in args.only]
    run(chosen, Setting(args.device, args.tiny), 60 * args.budget_minutes, report)
    summary = report.summary()
    print(json.dumps(finite(summary), ensure_ascii=False))
    return 1 if summary["failed"] or summary["conformance_faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
