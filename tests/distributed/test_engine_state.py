"""Training and resuming with real processes: every ZeRO stage, both precisions, one and two processes.

Each world runs all of its cases in one set of processes (engine_worker.py); the tests read what those reported.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import engine_worker as worker
from support.launch import finish, launch
from torch import nn

from kairos_train.basics.errors import UserError
from kairos_train.training.engine.deepspeed_engine import start_processes
from parallel.topology import Topology

DECAYED = ("inner.weight", "conv.weight", "extra.weight", "outer.weight")

CASES = [f"{stage}-{precision}-{size}" for size in (1, 2) for stage, precision in worker.CASES]
FP32 = [case for case in CASES if "fp32" in case]
BF16 = [case for case in CASES if "bf16" in case]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict, dict]:
    """Folder, reports of the uninterrupted runs and of the resumed ones, by case."""
    folder = tmp_path_factory.mktemp("engine")
    worlds = [launch("engine_worker.py", [folder], size=size, logs=folder) for size in (1, 2)]
    finish([*worlds[0], *worlds[1]], logs=folder)
    reports = []
    for phase in ("train", "resume"):
        of_worlds = [json.loads((folder / f"{phase}-{size}.json").read_text()) for size in (1, 2)]
        reports.append({**of_worlds[0], **of_worlds[1]})
    return folder, reports[0], reports[1]


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[float]], dict, dict]:
    """Losses and norms, final weights and average of a loop in plain torch, without processes."""
    torch.set_num_threads(1)
    config, net = worker.make_config(0, "fp32"), worker.make_net(0)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in named.items() if name in DECAYED], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name not in DECAYED], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    average = {name: p.detach().clone() for name, p in named.items()}
    steps = []
    for step in range(worker.STEPS):
        x, mask = worker.make_batch(step)
        loss = sum(worker.local_sum(net, x[i], mask[i]) for i in range(worker.MICRO)) / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(named.values(), 10.0)
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * min(1.0, (step + 1) / 3)
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        average = {name: decay * average[name] + (1 - decay) * p.detach() for name, p in named.items()}
        steps.append([loss.item(), norm.item()])
    return steps, {name: p.detach() for name, p in named.items()}, average


def numbers(report: dict) -> torch.Tensor:
    """(steps, 2): losses and norms."""
    return torch.tensor([[float.fromhex(loss), float.fromhex(norm)] for loss, norm, _ in report["steps"]])


def distance(a: dict, b: dict, names) -> float:
    """Relative distance of two sets of tensors."""
    a, b = (torch.cat([tensors[name].flatten() for name in names]).double() for tensors in (a, b))
    return float((a - b).norm() / b.norm())


def load_final(folder: Path, case: str, section: str) -> dict:
    tensors = load_file(folder / f"final-{case}.safetensors")
    return {name.removeprefix(f"{section}/"): t for name, t in tensors.items() if name.startswith(section)}


@pytest.mark.parametrize("case", FP32)
def test_every_stage_and_world_trains_as_plain_torch_does(runs, plain, case):
    folder, trained, _ = runs
    steps, weights, average = plain
    expected = torch.tensor(steps)
    assert (expected[:, 1] > 10).all(), "clipping is active"
    assert all(stepped for *_, stepped in trained[case]["steps"])
    torch.testing.assert_close(numbers(trained[case]), expected, rtol=2e-6, atol=0)
    assert distance(load_final(folder, case, "model"), weights, weights) < 5e-6
    assert distance(load_final(folder, case, "ema"), average, weights) < 5e-6


@pytest.mark.parametrize("case", BF16)
def test_bf16_stays_near_fp32(runs, plain, case):
    _, trained, _ = runs
    torch.testing.assert_close(numbers(trained[case]), torch.tensor(plain[0]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_norms_are_equal_in_all_stages_before_roundings_differ(runs, size):
    _, trained, _ = runs
    first = torch.stack([numbers(trained[f"{stage}-bf16-{size}"])[0] for stage in range(4)])
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=2e-6, atol=0)


def test_masters_start_from_float32_weights_of_rank_zero_in_either_precision(runs):
    _, trained, _ = runs
    net = worker.make_net(0)
    expected = worker.digest({name: t for name, t in net.state_dict().items()})
    assert {report["initial"]["model"] for report in trained.values()} == {expected}
    assert {report["initial"]["ema"] for report in trained.values()} == {expected}


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_and_buffers_are_kept_unrounded(runs, case):
    folder, _, _ = runs
    start = worker.make_net(0).state_dict()
    for section in ("model", "ema"):
        final = load_final(folder, case, section)
        assert final.keys() == start.keys()
        changed = {name for name, tensor in final.items() if not torch.equal(tensor, start[name])}
        assert changed == start.keys() - {"fixed.weight", "fixed.bias", "scale"}


@pytest.mark.parametrize("case", CASES)
def test_a_non_finite_gradient_on_one_rank_changes_nothing(runs, case):
    _, trained, _ = runs
    report = trained[case]
    _, norm, stepped = report["poisoned"]
    assert (norm, stepped) == ("inf", False)
    assert report["after_poison"] == report["before_poison"]


@pytest.mark.parametrize("case", CASES)
def test_resuming_in_the_same_layout_repeats_every_bit(runs, case):
    _, trained, resumed = runs
    report = resumed[case][case]
    assert report["loaded"] == trained[case]["before_poison"]
    assert report["steps"] == trained[case]["steps"][worker.SAVED :]
    assert report["final"] == trained[case]["final"]


@pytest.mark.parametrize("case", CASES)
def test_resuming_in_another_stage_or_world_restores_every_bit_and_continues(runs, case):
    _, trained, resumed = runs
    sources = [name for name in resumed[case] if name not in (case, "refused")]
    assert len(sources) == 7
    for source in sources:
        report = resumed[case][source]
        assert report["loaded"] == trained[source]["before_poison"], source
        expected = numbers(trained[source])[worker.SAVED :]
        rtol = 1e-6 if "fp32" in case else 2e-2
        torch.testing.assert_close(numbers(report), expected, rtol=rtol, atol=0, msg=lambda m, s=source: f"{s}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_with_the_average_and_gets_its_weights_back(runs, case):
    folder, trained, _ = runs
    report = trained[case]
    assert report["after_averaging"] == report["final"]
    assert report["plain"][0] == report["plain"][1]
    net = worker.make_net(1)
    for section, value in (("model", report["plain"][0]), ("ema", report["averaged"])):
        net.load_state_dict(load_final(folder, case, section))
        if "bf16" in case:
            for p in net.parameters():
                p.data = p.data.bfloat16()
        with torch.no_grad():
            x = worker.make_batch(9)[0][0]
            expected = worker.local_sum(net, x, torch.ones(len(x), dtype=torch.bool)).item()
        assert float.fromhex(value) == pytest.approx(expected, rel=1e-6)
    assert report["averaged"] != report["plain"][0]


@pytest.mark.parametrize("case", ["0-bf16-2", "1-bf16-2"])
def test_a_layer_used_on_one_rank_counts_in_the_norm_of_all(runs, case):
    _, trained, _ = runs
    first, second = trained[case]["norms_of_ranks"]
    assert first == second


def test_devices_stages_and_precisions_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"train\.device='tpu'"):
        start_processes("tpu")
    alone = Topology.single(torch.device("cpu"))
    with pytest.raises(UserError, match=r"train\.zero_stage=4"):
        worker.build(0, worker.make_config(4, "fp32"), alone)
    with pytest.raises(UserError, match=r"train\.precision='fp16'"):
        worker.build(0, worker.make_config(0, "fp16"), alone)


def test_an_output_that_deepspeed_cannot_look_into_is_refused(runs):
    _, _, resumed = runs
    assert "returned a SimpleNamespace" in resumed["0-fp32-1"]["refused"]["output"]


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("1")])
def test_checkpoints_of_other_models_and_stages_are_refused_and_change_nothing(runs, case):
    _, _, resumed = runs
    refused = resumed[case]["refused"]
    expected = ["model/scale has shape [6]", "lacks 'fixed.weight'", "has 'other.weight'", "lacks 'norm.bias'"]
    expected.append("has 'fixed.weight'")
    assert len(refused["messages"]) == len(expected)
    for message, part in zip(refused["messages"], expected):
        assert part in message
    assert refused["before"] == refused["after"]
