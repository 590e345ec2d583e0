"""`kairos-train plan`: what is legal, what it prints, and that the derivation in docs/plan.md is its arithmetic."""

import ast
import json
import operator
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.terminal import on_a_terminal

from kairos_train import cli
from kairos_train.config.compose import load_config
from kairos_train.plan.cost import bandwidth, cost, data_bandwidth
from kairos_train.plan.estimate import Plan
from kairos_train.plan.layout import Layout, SampleShape
from kairos_train.plan.report import SECTIONS
from kairos_train.plan.search import search

ROOT = Path(__file__).resolve().parents[3]
ACCEPTANCE = ["model=kairos_4b", "data=video_480p", "parallel.context=8", "parallel.tensor=1", "cluster=h200"]
KEYS = {"legal", "tokens_per_rank", "frames_per_rank", "memory_gb", "flops_per_step", "bytes_per_step"}
KEYS |= {"seconds_per_step", "checkpoint_gb"}
CATEGORIES = {"weights", "gradients", "optimizer", "ema", "activations", "exchange", "working"}


def configure(*overrides: str):
    return load_config(["model=kairos_4b", "data=video_480p", *overrides], sections=SECTIONS)


def lay_out(*overrides: str, gpus: int) -> Layout:
    config = configure(*overrides)
    return Layout.of(config, SampleShape.of(config, 128), gpus=gpus)


def plan(*overrides: str, gpus: int | None = None) -> Plan:
    config = configure(*overrides)
    return Plan.of(config, SampleShape.of(config, 128), gpus=gpus)


def printed(capsys, *words: str) -> dict[str, Any]:
    """The JSON object that a legal plan prints."""
    assert cli.main(["plan", *words, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


# --- the command ---


def test_json_has_the_numbers_of_a_480p_clip_on_eight_context_ranks(capsys):
    numbers = printed(capsys, *ACCEPTANCE)
    assert numbers.keys() >= KEYS
    assert numbers["legal"] is True
    assert sum(numbers["tokens_per_rank"]) == 32_760
    assert numbers["frames_per_rank"] == [3, 3, 3, 3, 3, 2, 2, 2]
    assert numbers["memory_gb"].keys() == CATEGORIES | {"total"}
    assert numbers["memory_gb"]["total"] == pytest.approx(sum(numbers["memory_gb"][name] for name in CATEGORIES))
    assert 0.7e15 < numbers["flops_per_step"] < 0.9e15
    assert numbers["flops_per_sample"] == numbers["flops_per_step"]
    assert numbers["bytes_per_step"].keys() == {"tensor", "context", "data"}
    assert any("no actions" in note for note in numbers["notes"])


def test_search_finds_a_layout_for_long_720p_clips_on_64_gpus(capsys):
    asked = ["model=kairos_4b", "data=video_720p", "data.window.frames=241", "cluster=h200", "--gpus", "64"]
    numbers = printed(capsys, *asked, "--search")
    assert numbers["gpus"] == 64
    assert sum(numbers["tokens_per_rank"]) == 61 * 44 * 80
    assert numbers["fits"]
    assert numbers["memory_gb"]["total"] < 0.9 * 141
    again = printed(capsys, *asked, *numbers["overrides"])
    assert again["seconds_per_step"] == numbers["seconds_per_step"]
    seconds = [found["seconds_per_sample"] for found in numbers["search"]["best"]]
    assert seconds == sorted(seconds)
    assert seconds[0] == pytest.approx(numbers["seconds_per_step"] / numbers["samples_per_step"])


def test_the_table_says_the_same_for_people(monkeypatch):
    out = on_a_terminal(monkeypatch, "plan", *ACCEPTANCE)
    assert out.startswith("kairos_4b on 8 × h200: tensor 1 × context 8 × data 1, ZeRO 1, bf16, recompute none\n")
    assert "5 × 4,680, 3 × 3,120" in out
    assert "884.83 T per sample" in out


def test_the_search_of_a_small_model_prints_its_best_layouts(monkeypatch):
    words = "model=tiny encoders=weight_free data=demo stage=physical cluster=a100 --search --gpus 4"
    lines = on_a_terminal(monkeypatch, "plan", *words.split()).splitlines()
    assert re.fullmatch(r"\d+ of \d+ legal layouts fit; the cheapest:", lines[0])
    assert sum("s/sample" in line for line in lines) == 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("parallel.tensor=3", "parallel.tensor=3 does not divide model.num_heads=20; use one of 1, 2, 4"),
        ("parallel.tensor=5", "parallel.tensor=5 does not divide model.action.ffn_dim=4096; use one of 1, 2, 4"),
        ("parallel.tensor=2 --gpus 5", "5 processes do not divide into parallel.tensor=2"),
        ("parallel.sequence=true", "parallel.sequence=true shares tokens between tensor ranks"),
        ("parallel.contxt=2", "unknown key 'parallel.contxt'; did you mean parallel.context?"),
        (
            "stage=physical parallel.tensor=5 parallel.sequence=true data.window.height=32 data.window.width=96",
            "parallel.sequence=true: the 12 tokens of a frame do not divide over parallel.tensor=5 ranks",
        ),
        ("train.zero_stage=3 train.recompute=selective", "train.recompute=selective with train.zero_stage=3"),
        ("--search", "--search needs the number of GPUs; give --gpus N"),
        ("--search --gpus 1 cluster=a100", "--gpus 1: none of 11 layouts fits cluster.memory_gb=80"),
        ("precision.fp8.recipe=mxfp8 model.video.ffn_dim=10250", "precision.fp8.recipe=mxfp8 needs layer widths"),
        (
            "precision.fp8.recipe=mxfp8 model.video.ffn_dim=10250 --search --gpus 2",
            "--gpus 2: no layout is legal; the last one tried: precision.fp8.recipe=mxfp8 needs layer widths",
        ),
    ],
)
def test_what_is_not_legal_has_its_reason_and_exit_code_2(words, reason, capsys):
    words = ["plan", "model=kairos_4b", "data=video_480p", *words.split()]
    assert cli.main([*words, "--json"]) == 2
    captured = capsys.readouterr()
    refused = json.loads(captured.out)
    assert captured.err == ""
    assert refused.keys() == {"legal", "reason"}
    assert refused["legal"] is False
    assert refused["reason"].startswith(reason)
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"kairos-train: error: {reason}")
    assert captured.err.count("\n") == 1


def test_a_video_stage_may_split_into_twenty():
    assert plan("stage=physical", "parallel.tensor=20").layout.heads == 1


def test_planning_needs_no_processes_and_no_training_packages():
    code = (
        "import sys, torch.distributed as dist; from kairos_train import cli\n"
        f"assert cli.main(['plan', *{ACCEPTANCE}, '--json']) == 0\n"
        "assert not dist.is_initialized()\n"
        "print(sorted({'deepspeed', 'megatron', 'transformer_engine', 'fla'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stderr.strip() == "[]"


# --- layouts ---


def test_ranks_beyond_the_frames_hold_none_and_are_named():
    numbers = plan("data.window.frames=9", "parallel.context=4").numbers()
    assert numbers["frames_per_rank"] == [1, 1, 1, 0]
    assert any("1 of 4 context ranks hold no frame" in note for note in numbers["notes"])


def test_what_is_left_of_the_gpus_is_data_parallel():
    layout = lay_out("parallel.tensor=2", "parallel.context=4", "train.accumulation=3", gpus=64)
    assert (layout.degrees.data, layout.samples_per_step, layout.gradient_ranks) == (8, 24, 32)


@pytest.mark.parametrize(
    ("frames", "budget", "samples"), [(81, "null", 16), (81, 32_760, 1), (9, 32_760, 7), (241, 1, 1)]
)
def test_a_token_budget_decides_how_many_samples_a_micro_batch_has(frames, budget, samples):
    overrides = (f"data.window.frames={frames}", f"data.tokens_per_micro_batch={budget}")
    assert lay_out(*overrides, gpus=1).batch == samples


def test_actions_are_planned_where_data_and_stage_have_them():
    libero = ["model=kairos_4b_libero", "data=libero"]
    joint, video = configure(*libero, "stage=joint"), configure(*libero, "stage=behaviour")
    assert (SampleShape.of(joint, 128).actions, SampleShape.of(video, 128).actions) == (32, 0)
    assert SampleShape.of(joint, 128).tokens == 14 * 14  # one camera: how many there are is not known before


def test_a_composed_picture_is_planned_without_its_cameras():
    assert SampleShape.of(configure("data=robotwin"), 128).tokens == 24 * 20


def test_cameras_beside_each_other_widen_the_picture():
    assert SampleShape.of(configure("data=libero", "data.window.cameras=[a,b]"), 128).tokens == 14 * 28


# --- traffic and time ---


@pytest.mark.parametrize(("ranks", "method", "forward"), [(4, "auto", 47.2), (8, "auto", 110), (16, "auto", 10.5)])
def test_states_are_as_many_bytes_as_the_design_says_however_many_the_tokens(ranks, method, forward):
    overrides = ("stage=physical", "model.video.layer_cycle=[GATED]", f"parallel.context={ranks}")
    short, long = (
        plan(*overrides, f"parallel.state_exchange={method}", f"data.window.frames={frames}") for frames in (81, 161)
    )
    backward = forward if method == "ring" or ranks > 8 else forward * 2 / 3
    assert short.cost.received.context == long.cost.received.context
    assert short.cost.received.context == pytest.approx(32e6 * (forward + backward), rel=0.01)


def test_frames_of_undilated_windows_are_as_many_bytes_as_the_design_says():
    whole = plan("stage=physical", "model.video.layer_cycle=[SWA]", "parallel.context=8", "data.window.frames=241")
    assert whole.cost.received.context == pytest.approx(32 * 2 * 63.9e6, rel=0.01)


def test_recomputed_layers_communicate_again_and_compute_again():
    kept, again = (plan("parallel.context=4", f"train.recompute={r}") for r in ("none", "block"))
    assert again.memory.activations < 0.3 * kept.memory.activations
    assert again.cost.received.context > 1.4 * kept.cost.received.context
    assert again.cost.hardware_flops > 1.3 * kept.cost.hardware_flops
    assert again.cost.flops == kept.cost.flops


def test_offloaded_activations_lie_in_host_memory():
    device, host = plan("parallel.context=8"), plan("parallel.context=8", "train.offload_activations=true")
    numbers = host.numbers()
    assert host.memory.activations < 0.1 * device.memory.activations
    assert numbers["host_activations_gb"] == pytest.approx(device.memory.activations / 1e9, rel=0.02)
    assert device.numbers()["host_activations_gb"] == 0


def test_groups_within_a_node_use_its_links():
    layout = lay_out("parallel.tensor=2", "parallel.context=4", gpus=64)
    assert bandwidth(layout, 2) == bandwidth(layout, 8) == 450e9
    assert bandwidth(layout, 16) == 50e9
    assert data_bandwidth(layout) == 200e9  # four ranks of a gradient group in a node, a card each
    assert data_bandwidth(lay_out("parallel.context=8", gpus=8)) == 450e9
    assert bandwidth(lay_out("parallel.context=3", gpus=24), 3) == 50e9  # ranks 6, 7, 8 are in two nodes


def test_seconds_are_the_parts_and_mfu_is_what_is_left():
    whole = plan("parallel.tensor=2", "parallel.context=4", "train.zero_stage=3", gpus=64)
    cluster = whole.layout.config.cluster
    assert whole.cost.seconds == pytest.approx(sum(whole.numbers()["seconds"].values()))
    assert whole.numbers()["mfu"] == pytest.approx(
        whole.cost.flops / whole.cost.seconds / (64 * cluster.peak_tflops * 1e12)
    )
    assert whole.numbers()["mfu"] < cluster.mfu


def test_one_rank_alone_computes_at_the_mfu_of_the_cluster():
    alone = plan("cluster.mfu=0.5")
    assert set(alone.cost.received.by_group.values()) == {0}
    assert alone.numbers()["mfu"] == pytest.approx(0.5)


def test_weights_of_stage_3_are_fetched_while_the_rank_computes():
    layout = lay_out("parallel.context=8", "train.zero_stage=3", gpus=8)
    cluster = replace(layout.config.cluster, intra_node_gb_per_s=10)
    slow = replace(layout, config=replace(layout.config, cluster=cluster))
    hidden, exposed = cost(layout), cost(slow)
    reduced = hidden.received.data - hidden.received.gathered_weights
    assert hidden.data == pytest.approx(reduced / 450e9)
    assert exposed.data == pytest.approx((hidden.received.data) / 10e9 - exposed.compute)


# --- search ---


def test_the_search_tries_what_is_legal_and_keeps_what_fits():
    config = configure("stage=physical", "cluster.memory_gb=80")
    found = search(config, SampleShape.of(config, 128), gpus=8)
    # (tensor, context) = (1, 1) (1, 2) (1, 4) (1, 8), and twice, with sequence, (2, ·) three times, (4, ·) twice;
    # each in 4 stages times 3 ways to recompute, less one that stage 3 cannot.
    assert found.legal == (4 + 2 * (3 + 2)) * 11
    assert 0 < len(found.fitting) < found.legal
    assert all(plan.memory.total <= 72e9 for plan in found.fitting)
    assert found.best.seconds_per_sample == min(plan.seconds_per_sample for plan in found.fitting)


# --- the derivation ---

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
LINE = re.compile(r"^\S.*?\s{2,}(?P<formula>[\d(].*?) += (?P<value>[\d.,]+)(?: +-> (?P<key>\S+))?$", re.M)


def derivations() -> list[re.Match]:
    return list(LINE.finditer((ROOT / "docs/plan.md").read_text()))


def evaluate(node: ast.AST) -> float:
    if isinstance(node, ast.Expression):
        return evaluate(node.body)
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](evaluate(node.left), evaluate(node.right))
    assert isinstance(node, ast.Constant)
    return node.value


def number(text: str) -> float:
    return float(text.replace(",", ""))


def rounding(text: str) -> float:
    """How far the exact value may be: sums of rounded numbers may be one off in the last digit, whole numbers not."""
    decimals = len(text.partition(".")[2])
    return 1.0001 * 10**-decimals if decimals else 0.5


@pytest.mark.parametrize("line", derivations(), ids=lambda line: line[0].split("  ")[0])
def test_the_derivation_computes(line):
    value = evaluate(ast.parse(line["formula"].replace(",", ""), mode="eval"))
    assert value == pytest.approx(number(line["value"]), abs=rounding(line["value"]), rel=0)


def test_the_derivation_ends_at_what_plan_prints(capsys):
    numbers, tagged = printed(capsys, *ACCEPTANCE), set()
    for line in derivations():
        if line["key"]:
            value: Any = numbers
            for part in line["key"].split("."):
                value = value[int(part)] if isinstance(value, list) else value[part]
            value = sum(value) if isinstance(value, list) else value
            assert value == pytest.approx(number(line["value"]), abs=rounding(line["value"]), rel=0), line[0]
            tagged.add(line["key"])
    wanted = {f"memory_gb.{name}" for name in CATEGORIES - {"working"}} | {"memory_gb.total", "bytes_per_step.data"}
    wanted |= {"tokens_per_rank", "bytes_per_step.context", "flops_per_step", "seconds_per_step", "checkpoint_gb"}
    assert wanted <= tagged
    assert numbers["memory_gb"]["working"] == numbers["bytes_per_step"]["tensor"] == 0
