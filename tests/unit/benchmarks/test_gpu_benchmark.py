"""benchmarks/gpu.py as far as a CPU shows it: toy sizes end to end, faults, time limits, exit codes, its oracles."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
from gpu_sections import conformance, speed  # noqa: E402
from gpu_sections.harness import Setting, check, max_ratio, ratio, rms_ratio  # noqa: E402

from kairos_train.model.kernels.attention import Windows  # noqa: E402
from kairos_train.model.kernels.delta_rule import gated_delta_rule  # noqa: E402
from parallel.exchange import state_passing  # noqa: E402

TINY = Setting("cpu", tiny=True)


def test_a_tiny_run_on_a_cpu_fills_the_file_and_ends_with_one_json_line(tmp_path):
    out = tmp_path / "results" / "gpu.json"
    without_processes = [section.name for section in gpu.SECTIONS if section.name != "state_passing"]
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    result = subprocess.run([*command, "--only", *without_processes], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    summary, found = json.loads(result.stdout.strip().splitlines()[-1]), json.loads(out.read_text())
    assert summary["failed"] == []
    assert summary["faults"] == {}
    assert summary["unfinished"] == []
    assert summary["passed"] > 30
    assert summary["machine"]["torch"] == torch.__version__
    assert set(found["sections"]) == {"machine", *without_processes}
    assert all(section["status"] == "done" for section in found["sections"].values())
    assert found["commit"]
    assert found["date"]
    step = found["sections"]["step"]["entries"]["video step"]
    assert {"ours", "ours, selective", "baseline"} <= {name for name, e in step.items() if isinstance(e, dict)}
    assert step["tokens"] == 20
    assert all(f"layer {kind}" in found["sections"]["blocks"]["entries"] for kind in speed.KINDS)
    if not torch.cuda.is_available():
        assert any("fla" in reason for reason in summary["absent"].values())
        assert any("CUDA GPU" in reason for reason in summary["absent"].values())
    assert not list(out.parent.glob(".*")), "no temporary file is left"


def test_full_sizes_are_not_tried_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "--tiny" in capsys.readouterr().err


# --- faults and limits ---

FAULTY = """
import os, time

def wrong(setting):
    yield "close", {"measure": "m", "errors": {"x": 0.0}, "tolerances": {"x": 1.0}, "passed": True}
    yield "far", {"measure": "m", "errors": {"x": float("inf")}, "tolerances": {"x": 1.0}, "passed": False}

def raises(setting):
    yield "before", {"passed": True}
    raise ZeroDivisionError("of course")

def dies(setting):
    yield "before", {"passed": True}
    os._exit(3)

def hangs(setting):
    yield "before", {"passed": True}
    time.sleep(600)

def after(setting):
    yield "here", {"passed": True}
"""


def test_faults_and_limits_of_a_section_leave_what_was_found_and_the_sections_after_it(tmp_path, monkeypatch):
    (tmp_path / "faulty_sections.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    report = gpu.GpuReport(tmp_path / "gpu.json", {"date": "d", "commit": "c", "device": "cpu", "tiny": True})
    names = ("wrong", "hangs", "raises", "dies", "after")
    limits = {"hangs": 1.0}  # in a worker that runs already
    sections = [gpu.Section(name, "faulty_sections", limits.get(name, 60.0)) for name in names]
    gpu.run(sections, TINY, 600.0, report)
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: found[name]["status"] for name in names} == {
        "wrong": "done",
        "raises": "error",
        "dies": "error",
        "hangs": "timeout",
        "after": "done",
    }
    assert all(found[name]["entries"] == {"before": {"passed": True}} for name in ("raises", "dies", "hangs"))
    assert found["raises"]["fault"].startswith("ZeroDivisionError: of course (faulty_sections.py:")
    assert "exit code 3" in found["dies"]["fault"]
    assert found["wrong"]["entries"]["far"]["errors"]["x"] == "inf", "JSON has no infinity"
    summary = report.summary()
    assert summary["failed"] == ["wrong: far"]
    assert set(summary["faults"]) == {"raises", "dies"}
    assert summary["unfinished"] == ["hangs"]


def test_a_spent_budget_skips_what_is_left_and_says_so(tmp_path):
    report = gpu.GpuReport(tmp_path / "gpu.json", {"date": "d", "commit": "c", "device": "cpu", "tiny": True})
    gpu.run(list(gpu.SECTIONS), TINY, 1.0, report)
    assert set(report.summary()["unfinished"]) == {"machine", *(section.name for section in gpu.SECTIONS)}
    assert {section["status"] for section in report.found["sections"].values()} == {"skipped"}


@pytest.mark.parametrize(
    ("section", "entry", "fault", "code"),
    [
        ("windows", {"passed": True}, None, 0),
        ("windows", {"passed": False}, None, 1),
        ("windows", {"passed": True}, "it broke", 1),
        ("compiled", {"ours": {"error": "it broke"}}, "it broke", 0),
    ],
)
def test_the_exit_code_tells_of_conformance(section, entry, fault, code, tmp_path, monkeypatch, capsys):
    def run(sections, setting, budget, report):
        report.entry(section, "x", entry)
        report.end(section, "error" if fault else "done", 1.0, fault)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--tiny", "--out", str(tmp_path / "x.json")])
    assert gpu.main() == code
    summary = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert ("it broke" in summary["faults"].values()) == bool(fault)


# --- measures ---


def test_a_check_takes_the_tolerance_of_the_longest_name_that_fits():
    entry = check({"out": 0.5, "d_k": 0.5, "d_gate": 0.5}, {"": 1.0, "d_": 0.6, "d_g": 0.1}, "rms")
    assert entry["tolerances"] == {"out": 1.0, "d_k": 0.6, "d_gate": 0.1}
    assert not entry["passed"]
    assert check({"x": math.nan}, {"": 1.0}, "rms")["passed"] is False


def test_errors_are_relative_and_what_is_not_finite_is_infinitely_wrong():
    reference = torch.tensor([3.0, 4.0])
    assert rms_ratio(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.1)
    assert max_ratio(torch.tensor([3.0, 4.5]), reference) == pytest.approx(0.125)
    assert rms_ratio(torch.tensor([3.0, math.nan]), reference) == math.inf
    assert max_ratio(torch.tensor([3.0, math.inf]), reference) == math.inf
    assert rms_ratio(torch.ones(2), torch.zeros(2)) == pytest.approx(2**0.5)
    assert ratio({"a": {"seconds": 3.0}, "b": {"seconds": 2.0}}, "a", "b") == 1.5
    assert ratio({"a": {"error": "x"}, "b": {"seconds": 2.0}}, "a", "b") is None


# --- oracles ---


def test_the_baselines_mask_is_that_of_the_rule():
    frames, tokens = 13, 3
    for rule in conformance.rules().values():
        if rule.token_window:
            continue
        windows = Windows.whole(rule, (2,), frames)
        b, i, j = torch.tensor(0), torch.arange(frames * tokens)[:, None], torch.arange(frames * tokens)
        expected = windows.mask_fn(tokens, torch.device("cpu"))(b, i, j)
        assert torch.equal(speed.dense_mask(windows, tokens, torch.device("cpu"))[0, 0], expected)


@pytest.mark.parametrize("decay", conformance.DECAYS.values())
@pytest.mark.parametrize("cut", [64, 70])
def test_two_shards_in_one_process_are_the_whole_sequence(decay, cut):
    x = conformance.rule_inputs(TINY, 150, decay=decay, dtype=torch.float64)
    cotangents = conformance.rule_cotangents(x)
    whole = conformance.run_rule(x, cotangents, "torch")
    ours = conformance.in_two_shards(x, cotangents, cut, "torch")
    assert set(ours) == set(whole)
    for name in whole:
        assert max_ratio(ours[name], whole[name]) < 1e-12, name


def test_the_remembering_decay_shows_a_state_that_was_not_passed():
    x = conformance.rule_inputs(TINY, 150, decay=conformance.DECAYS["remembering"], dtype=torch.float64)
    out, _ = gated_delta_rule(*x.values())
    second = [t[:, 70:] for name, t in x.items() if name != "initial_state"]
    base, *_ = state_passing.local_map(partial(gated_delta_rule, backend="torch"), *second)
    assert rms_ratio(base[:, :64], out[:, 70:134]) > 10 * conformance.PASSING_BF16[""]


def test_plain_kernels_are_used_within_and_gone_after():
    layer = speed.Layer(TINY, speed.video_stream(TINY), "SWA")
    masks = {}
    usual = speed.attention.window_attention
    entry = layer.difference(masks)
    assert len(masks) == 1
    assert entry["passed"]
    (key,) = masks
    masks[key] = torch.ones_like(masks[key])  # full attention
    assert not layer.difference(masks)["passed"]
    assert speed.attention.window_attention is usual


def test_a_layers_flops_add_up_to_the_streams():
    config = speed.video_stream(Setting("cuda", tiny=False))
    frames, _, _, context = speed.sizes(Setting("cuda", tiny=False))
    shape = (frames, speed.tokens_per_frame(Setting("cuda", tiny=False)), context)
    assert frames * shape[1] == 32760
    total = speed.training_flops(config, *shape, history=1)
    assert 0.7e15 < total < 0.9e15
