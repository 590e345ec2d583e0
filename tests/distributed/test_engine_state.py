"""Training and resuming with real processes: every ZeRO stage, both precisions, one and two processes.

A case is named by the three, as `3-bf16-2`. Each trains once, and is resumed by itself and by a few others.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import engine_ranks as ranks
from torch import nn

from kairos_train.basics.errors import UserError
from kairos_train.training.engine.deepspeed_engine import start_processes
from parallel.topology import Topology

pytestmark = pytest.mark.slow

DECAYED = ("inner.weight", "conv.weight", "extra.weight", "outer.weight")

CASES = [f"{stage}-{precision}-{size}" for size in (1, 2) for precision in ("fp32", "bf16") for stage in range(4)]
FP32 = [case for case in CASES if "fp32" in case]
BF16 = [case for case in CASES if "bf16" in case]


class Runs:
    """What the cases report, each computed when it is first asked for."""

    def __init__(self, world, folder: Path) -> None:
        self.folder, self._world = folder, world
        self._trained: dict[str, dict] = {}

    def train(self, case: str) -> dict:
        """Report of a run that nothing interrupted; its checkpoint lies in the folder afterwards."""
        if case not in self._trained:
            self._trained[case] = self._run(ranks.train, case)
        return self._trained[case]

    def resume(self, case: str, *sources: str) -> dict[str, dict]:
        """Reports of an engine of this case that continues the checkpoints of others, by their names."""
        for source in sources:
            self.train(source)
        return self._run(ranks.resume, case, list(sources))

    def refuse(self, case: str) -> dict:
        return self._run(ranks.refuse, case)

    def weights(self, case: str, section: str) -> dict[str, torch.Tensor]:
        """Final ones."""
        self.train(case)
        tensors = load_file(self.folder / f"final-{case}.safetensors")
        return {name.removeprefix(f"{section}/"): t for name, t in tensors.items() if name.startswith(section)}

    def _run(self, function, case: str, *more) -> dict:
        stage, precision, size = case.split("-")
        return self._world(int(size)).run(function, self.folder, int(stage), precision, *more)[0]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Runs:
    return Runs(world, tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def plain() -> tuple[list[list[float]], dict, dict]:
    """Losses and norms, final weights and average of a loop in plain torch, without processes."""
    torch.set_num_threads(1)
    config, net = ranks.make_config(0, "fp32"), ranks.make_net(0)
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in named.items() if name in DECAYED], "weight_decay": 0.1},
        {"params": [p for name, p in named.items() if name not in DECAYED], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    average = {name: p.detach().clone() for name, p in named.items()}
    steps = []
    for step in range(ranks.STEPS):
        x, mask = ranks.make_batch(step)
        loss = sum(ranks.local_sum(net, x[i], mask[i]) for i in range(ranks.MICRO)) / mask.sum()
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


@pytest.mark.parametrize("case", FP32)
def test_every_stage_and_world_trains_as_plain_torch_does(runs, plain, case):
    trained, (steps, weights, average) = runs.train(case), plain
    expected = torch.tensor(steps)
    assert (expected[:, 1] > 10).all(), "clipping is active"
    assert all(stepped for *_, stepped in trained["steps"])
    torch.testing.assert_close(numbers(trained), expected, rtol=2e-6, atol=0)
    assert distance(runs.weights(case, "model"), weights, weights) < 5e-6
    assert distance(runs.weights(case, "ema"), average, weights) < 5e-6


@pytest.mark.parametrize("case", BF16)
def test_bf16_stays_near_fp32(runs, plain, case):
    torch.testing.assert_close(numbers(runs.train(case)), torch.tensor(plain[0]), rtol=2e-2, atol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_bf16_norms_are_equal_in_all_stages_before_roundings_differ(runs, size):
    first = torch.stack([numbers(runs.train(f"{stage}-bf16-{size}"))[0] for stage in range(4)])
    torch.testing.assert_close(first, first[:1].expand_as(first), rtol=2e-6, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_masters_start_from_float32_weights_of_rank_zero_in_either_precision(runs, case):
    expected, initial = ranks.digest(dict(ranks.make_net(0).state_dict())), runs.train(case)["initial"]
    assert (initial["model"], initial["ema"]) == (expected, expected)


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_and_buffers_are_kept_unrounded(runs, case):
    start = ranks.make_net(0).state_dict()
    for section in ("model", "ema"):
        final = runs.weights(case, section)
        assert final.keys() == start.keys()
        changed = {name for name, tensor in final.items() if not torch.equal(tensor, start[name])}
        assert changed == start.keys() - {"fixed.weight", "fixed.bias", "scale"}


@pytest.mark.parametrize("case", CASES)
def test_a_non_finite_gradient_on_one_rank_changes_nothing(runs, case):
    report = runs.train(case)
    _, norm, stepped = report["poisoned"]
    assert (norm, stepped) == ("inf", False)
    assert report["after_poison"] == report["before_poison"]


@pytest.mark.parametrize("case", CASES)
def test_resuming_in_the_same_layout_repeats_every_bit(runs, case):
    trained, resumed = runs.train(case), runs.resume(case, case)[case]
    assert resumed["loaded"] == trained["before_poison"]
    assert resumed["steps"] == trained["steps"][ranks.SAVED :]
    assert resumed["final"] == trained["final"]


def others(case: str) -> list[str]:
    """Cases of the same precision, those next in the list first."""
    alike = FP32 if case in FP32 else BF16
    return [alike[(alike.index(case) + i) % len(alike)] for i in range(1, len(alike))]


@pytest.mark.parametrize(
    ("case", "sources"),
    [
        # Every case is read once, always by another stage, most by another number of processes.
        *(pytest.param(case, others(case)[2:3], id=case) for case in CASES),
        *(pytest.param(case, others(case), id=f"{case}-all", marks=pytest.mark.nightly) for case in CASES),
    ],
)
def test_resuming_in_another_stage_or_world_restores_every_bit_and_continues(runs, case, sources):
    rtol = 1e-6 if "fp32" in case else 2e-2
    for source, report in runs.resume(case, *sources).items():
        trained = runs.train(source)
        assert report["loaded"] == trained["before_poison"], source
        expected = numbers(trained)[ranks.SAVED :]
        torch.testing.assert_close(numbers(report), expected, rtol=rtol, atol=0, msg=lambda m, s=source: f"{s}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_the_model_computes_with_the_average_and_gets_its_weights_back(runs, case):
    report = runs.train(case)
    assert report["after_averaging"] == report["final"]
    assert report["plain"][0] == report["plain"][1]
    net = ranks.make_net(1)
    for section, value in (("model", report["plain"][0]), ("ema", report["averaged"])):
        net.load_state_dict(runs.weights(case, section))
        if "bf16" in case:
            for p in net.parameters():
                p.data = p.data.bfloat16()
        with torch.no_grad():
            x = ranks.make_batch(9)[0][0]
            expected = ranks.local_sum(net, x, torch.ones(len(x), dtype=torch.bool)).item()
        assert float.fromhex(value) == pytest.approx(expected, rel=1e-6)
    assert report["averaged"] != report["plain"][0]


@pytest.mark.parametrize("case", ["0-bf16-2", "1-bf16-2"])
def test_a_layer_used_on_one_rank_counts_in_the_norm_of_all(runs, case):
    first, second = runs.train(case)["norms_of_ranks"]
    assert first == second


def test_devices_stages_and_precisions_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"train\.device='tpu'"):
        start_processes("tpu")
    alone = Topology.single(torch.device("cpu"))
    with pytest.raises(UserError, match=r"train\.zero_stage=4"):
        ranks.build(0, ranks.make_config(4, "fp32"), alone)
    with pytest.raises(UserError, match=r"train\.precision='fp16'"):
        ranks.build(0, ranks.make_config(0, "fp16"), alone)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("1")])
def test_checkpoints_of_other_models_and_outputs_of_other_kinds_are_refused_and_change_nothing(runs, case):
    refused = runs.refuse(case)
    expected = ["model/scale has shape [6]", "lacks 'fixed.weight'", "has 'other.weight'", "lacks 'norm.bias'"]
    expected.append("has 'fixed.weight'")
    assert len(refused["messages"]) == len(expected)
    for message, part in zip(refused["messages"], expected):
        assert part in message
    assert refused["before"] == refused["after"]
    assert "returned a SimpleNamespace" in refused["output"], "DeepSpeed cannot look into it"
