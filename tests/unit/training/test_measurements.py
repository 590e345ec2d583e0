"""What is measured while training, in one process: decays, phases, profiles, slow ranks, and the run's own files."""

import contextlib
import gzip
import json
import math
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support.model_factory import make_inputs, make_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kairos_train.basics.errors import MachineFault
from kairos_train.config.schema import TrainConfig
from kairos_train.model.activations import ActivationPolicy
from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.training.describe import peak_flops
from kairos_train.training.measure import decays
from kairos_train.training.measure.block_norms import block_kind
from kairos_train.training.measure.collective_times import CollectiveTimes
from kairos_train.training.measure.decays import DecayProbe
from kairos_train.training.measure.phases import PhaseClock
from kairos_train.training.measure.profiling import ProfilerWindow
from kairos_train.training.measure.stragglers import BusyTimes
from kairos_train.training.measure.telemetry import LOSSES, METRICS, Telemetry, headroom_gb
from kairos_train.training.samples import Samples
from kairos_train.training.step import StepReport
from parallel.topology import Topology

CPU = torch.device("cpu")
ALONE = Topology.single(CPU)


def run_passes(model, *, backward=True):
    for history in ((1, 2), (0, 0)):
        output = model(**make_inputs(history=history))
        if backward:
            (output.video.sum() + output.action.sum()).backward()


def test_decays_are_the_quantiles_of_what_the_layers_multiply_their_state_by():
    model, inputs = make_model(), {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: inputs.setdefault(name, []).append(args[0]))
        for name, layer in model.named_modules()
        if isinstance(layer, GatedDeltaNet)
    ]
    # Gated DeltaNet layers are called as modules, so that hooks see them.
    probe = DecayProbe(model)
    with probe.listening():
        run_passes(model, backward=False)
    for hook in hooks:
        hook.remove()
    values = probe.values()
    assert list(inputs) == ["video_dit.blocks.1.gated_delta", "video_dit.blocks.4.gated_delta"]
    for index, (name, parts) in zip((1, 4), inputs.items()):
        layer = model.get_submodule(name)
        with torch.no_grad():
            alpha = torch.cat([layer.log_decay(x.flatten(1, 2)).exp().flatten() for x in parts])
        assert alpha.numel() == 2 * 2 * 5 * 4 * 4, "two passes, two samples, five frames, four tokens, four heads"
        for q, share in {"q10": 0.1, "median": 0.5, "q90": 0.9}.items():
            assert values[f"decay/layer_{index:02d}_{q}"] == pytest.approx(float(alpha.quantile(share)), rel=1e-4)
        half_life = values[f"decay/layer_{index:02d}_half_life_tokens"]
        assert values[f"decay/layer_{index:02d}_median"] ** half_life == pytest.approx(0.5)
    assert len(values) == 2 * 4


def test_layers_that_are_computed_again_in_backward_count_once():
    plain, again = make_model(), make_model(activations=ActivationPolicy("block"))
    values = []
    for model in (plain, again):
        probe = DecayProbe(model)
        with probe.listening():
            run_passes(model)
        values.append(probe.values())
    assert values[0] == values[1]


def test_a_probe_hears_only_while_it_listens_and_leaves_the_model_as_it_was():
    model = make_model()
    before = {name: module.hooks for name, module in model.named_modules() if isinstance(module, GatedDeltaNet)}
    probe = DecayProbe(model)
    with contextlib.suppress(RuntimeError), probe.listening():
        run_passes(model, backward=False)
        raise RuntimeError
    first = probe.values()
    run_passes(model)
    assert probe.values() == first != {}
    with probe.listening():
        pass
    assert probe.values() == {}
    assert all(model.get_submodule(name).hooks is hooks for name, hooks in before.items())
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_of_many_tokens_evenly_spaced_ones_stand_for_all(monkeypatch):
    model = make_model()
    probe = DecayProbe(model)
    with probe.listening():
        run_passes(model, backward=False)
    all_tokens = probe.values()
    monkeypatch.setattr(decays, "MOST", 40)  # a pass has 160 values
    with probe.listening():
        run_passes(model, backward=False)
    few = probe.values()
    assert few != all_tokens
    assert few["decay/layer_01_median"] == pytest.approx(all_tokens["decay/layer_01_median"], abs=0.1)
    monkeypatch.setattr(decays, "MOST", 1)
    with probe.listening():
        run_passes(model, backward=False)
    assert probe.values().keys() == all_tokens.keys()


def test_a_model_without_gated_layers_has_no_decays():
    probe = DecayProbe(torch.nn.Linear(2, 2))
    with probe.listening():
        pass
    assert probe.values() == {}


def test_a_phase_inside_of_another_interrupts_it():
    clock = PhaseClock(CPU)
    begin = time.perf_counter()
    with clock.phase("follow_up"):
        time.sleep(0.02)
        with clock.phase("checkpoint"):
            time.sleep(0.1)
        time.sleep(0.02)
    whole = time.perf_counter() - begin
    with pytest.raises(RuntimeError), clock.phase("data"):
        raise RuntimeError
    times = clock.take(steps=2)
    assert times.keys() == {"time/follow_up", "time/checkpoint", "time/data"}
    assert times["time/checkpoint"] >= 0.05
    assert times["time/follow_up"] >= 0.02
    assert 2 * (times["time/follow_up"] + times["time/checkpoint"]) <= whole
    assert clock.take(steps=1) == {}


def test_a_phase_that_is_still_open_counts_when_it_is_over():
    clock = PhaseClock(CPU)
    with clock.phase("validation"):
        assert clock.take(steps=1) == {}
    assert clock.take(steps=1)["time/validation"] > 0


def test_one_process_without_groups_waits_for_nobody():
    with CollectiveTimes(ALONE) as times:
        time.sleep(0.01)
    assert times.seconds == {}
    assert times.busy == times.elapsed >= 0.01


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0, 1.0, 1.0, 1.0], []),
        ([1.0, 1.29, 1.0, 1.1], []),
        ([1.0, 1.0, 2.0, 1.5], [(2, 2.0), (3, 1.5)]),
        ([1.0, 3.0], [(1, 3.0)]),
        ([0.0, 0.0], []),
    ],
)
def test_ranks_that_are_busy_for_much_longer_than_the_median_are_told(seconds, slow):
    times = BusyTimes(ALONE, factor=1.3)
    times._hosts = [f"node{rank}" for rank in range(len(seconds))]
    comparison = times.judge(seconds)
    assert [(s.rank, s.factor) for s in comparison.stragglers] == slow
    assert all(s.host == f"node{s.rank}" for s in comparison.stragglers)
    assert comparison.values()["time/busy_max"] == max(seconds)


def test_one_process_is_no_straggler():
    comparison = BusyTimes(ALONE, factor=1.3).compare(2.0)
    assert comparison.values() == {"time/busy_max": 2.0, "time/busy_median": 2.0}
    assert comparison.stragglers == ()
    assert BusyTimes(ALONE, factor=0.5).compare(2.0).stragglers[0].host == socket.gethostname()


def test_every_parameter_of_the_model_has_a_kind():
    model = make_model()
    kinds = {name: block_kind(name, model.kinds) for name, _ in model.named_parameters()}
    assert kinds["video_dit.blocks.0.self_attn.q.weight"] == "SWA"
    assert kinds["video_dit.blocks.1.gated_delta.A_log"] == "GATED"
    assert kinds["video_dit.blocks.2.self_attn.norm_k.weight"] == "DSWA"
    assert kinds["video_dit.blocks.3.self_attn.o.bias"] == "FA"
    assert kinds["video_dit.blocks.1.cross_attn.q.weight"] == kinds["video_dit.blocks.0.cross_attn_norm.bias"]
    assert kinds["video_dit.blocks.0.ffn.0.weight"] == "ffn"
    assert kinds["video_dit.head.modulation"] == "embeddings_and_heads"
    assert kinds["video_dit.blocks.0.modulation"] == "modulation"
    assert kinds["action_dit.blocks.0.ffn.0.weight"] == "action"


def profiled(window: ProfilerWindow, steps: range) -> list:
    closed = []
    for step in steps:
        window.before_step(step)
        torch.ones(2).add_(1)
        closed.append(window.after_step(step))
    return closed


def test_a_profiler_window_is_where_it_was_set_and_where_it_is_asked_for(tmp_path):
    window = ProfilerWindow(tmp_path, rank=1, at=2, steps=2)
    first = profiled(window, range(1, 5))
    assert [profile is not None for profile in first] == [False, False, True, False]
    window.request()
    second = profiled(window, range(5, 8))
    assert [profile is not None for profile in second] == [False, True, False]
    for profile, (begin, end) in ((first[2], (2, 3)), (second[1], (5, 6))):
        assert (profile.first, profile.last, profile.problem) == (begin, end, None)
        assert profile.path == tmp_path / "profiles" / f"step-{begin:07d}-rank-1.json.gz"
        assert str(profile.path) in str(profile)
        with gzip.open(profile.path, "rt") as file:
            assert any(event.get("name") == "aten::add_" for event in json.load(file)["traceEvents"])
    assert sorted(path.name for path in (tmp_path / "profiles").iterdir()) == [first[2].path.name, second[1].path.name]


def test_a_window_that_is_open_at_the_end_of_a_run_is_written(tmp_path):
    window = ProfilerWindow(tmp_path, rank=0, at=1, steps=10)
    assert profiled(window, range(1, 3)) == [None, None]
    assert window.close(2).path.is_file()
    assert window.close(2) is None


def test_a_profile_that_cannot_be_written_says_so_and_ends_nothing(tmp_path):
    (tmp_path / "profiles").write_text("in the way")
    window = ProfilerWindow(tmp_path, rank=0, at=1, steps=1)
    (profile,) = profiled(window, range(1, 2))
    assert str(tmp_path / "profiles") in profile.problem
    window.request()
    assert profiled(window, range(2, 3))[0].problem


def report(**changes) -> StepReport:
    values = {"video_loss": 1.0, "action_loss": None, "loss": 1.0, "grad_norm": 2.0, "stepped": True, "samples": 4}
    return StepReport(**{**values, "bins": {"video": torch.ones(5, 2, dtype=torch.float64)}, **changes})


def open_telemetry(run_dir: Path, **changes) -> Telemetry:
    run_dir.mkdir(exist_ok=True)
    values = {"first_step": 0, "length": "10 steps", "peak_flops": None, "world": 1, "enabled": True}
    return Telemetry(run_dir, **{**values, **changes})


def tell(telemetry: Telemetry, step: int, **measured: float) -> None:
    telemetry.step(step, report(stepped=step != 2), lr=0.1, data_wait=0.0)
    totals = {"samples": 4, "tokens": 8}
    telemetry.report(step, share=0.1, corrupt=0, epochs=[0.5], totals=totals, measured=measured)


def test_lines_of_metrics_have_their_time_and_what_was_measured(tmp_path):
    telemetry, begin = open_telemetry(tmp_path / "run"), time.time()
    tell(telemetry, 1, **{"communication/tensor": 0.25})
    tell(telemetry, 2)
    telemetry.scalars(2, {"validation_raw/video": 3.0})
    telemetry.close()
    lines = [json.loads(line) for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert all(begin - 1 <= line["time"] <= time.time() + 1 for line in lines)
    assert lines[0]["communication/tensor"] == 0.25
    assert "communication/tensor" not in lines[1]
    assert [line["optimizer/skipped_steps"] for line in lines[:2]] == [0, 1]
    assert lines[0]["memory/gb"] > 0
    assert lines[0]["memory/headroom_gb"] > 0
    losses = [json.loads(line) for line in (tmp_path / "run" / LOSSES).read_text().splitlines()]
    assert all("time" not in line for line in losses), "losses of two runs compare as text"


def test_losses_are_those_of_the_checkpoint_whatever_the_disk_made_of_the_file(tmp_path):
    telemetry, path = open_telemetry(tmp_path / "run"), tmp_path / "run" / LOSSES
    for step in (1, 2, 3, 4):
        tell(telemetry, step)
    saved = telemetry.losses
    tell(telemetry, 5)
    telemetry.close()
    whole = path.read_text()
    assert whole.startswith(saved)
    assert len(saved.splitlines()) == 4
    for content in (whole.encode(), saved[:-9].encode(), b"\xff\n" + whole.encode()[9:], b"", None):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        telemetry = open_telemetry(tmp_path / "run", first_step=4, losses=saved)
        tell(telemetry, 5)
        telemetry.close()
        assert path.read_text() == telemetry.losses == whole
    telemetry = open_telemetry(tmp_path / "run", first_step=4, losses=None)  # a checkpoint of an earlier version
    assert telemetry.losses == path.read_text() == saved
    telemetry.close()
    open_telemetry(tmp_path / "run").close()
    assert path.read_text() == "", "a run that begins has none"


def test_peak_flops_are_those_of_the_configuration_and_unknown_on_a_cpu():
    assert peak_flops(TrainConfig(peak_tflops=123.0), CPU) == 123e12
    assert peak_flops(TrainConfig(), CPU) is None


def test_a_report_is_of_what_was_done_since_the_last_one(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, time=time.time)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr("kairos_train.training.measure.telemetry.time", clock)
    telemetry = open_telemetry(tmp_path / "run", world=2, peak_flops=1e12)
    every = {"samples": 4, "tokens": 100, "flops": 2e12}
    for step, (loss, video, action, stepped) in enumerate(
        [(1.0, 0.5, 0.25, True), (100.0, 90.0, 80.0, False), (3.0, 1.5, 0.75, True)], 1
    ):
        bins = {"video": torch.tensor([[video, 2.0], [0, 0], [0, 0], [0, 0], [4 * video, 4.0]])}
        done = report(loss=loss, video_loss=video, action_loss=action, stepped=stepped, bins=bins, **every)
        telemetry.step(step, done, lr=0.1, data_wait=1.0)
    clock.now = 10.0
    given = {"corrupt": 0, "epochs": [0.5, 2.0], "totals": {"samples": 12, "tokens": 300}}
    values = telemetry.report(3, share=0.1, **given)
    expected = {
        **{"loss/total": 2.0, "loss/video": 1.0, "loss/action": 0.5, "optimizer/skipped_steps": 1},
        **{"loss_by_sigma/video_0.0-0.2": 2.0 / 4, "loss_by_sigma/video_0.8-1.0": 8.0 / 8},
        **{"speed/seconds_per_step": 10 / 3, "speed/samples_per_second": 1.2, "speed/tokens_per_second": 30},
        **{"speed/model_tflops_per_second": 0.6, "speed/mfu": 0.3, "speed/data_wait_share": 0.3},
        **{"data/epochs_of_source_0": 0.5, "data/epochs_of_source_1": 2.0, "progress/stage_share": 0.1},
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    assert [name for name in values if name.startswith("loss_by")] == [n for n in expected if n.startswith("loss_by")]
    telemetry.step(4, report(stepped=False, **every), lr=0.1, data_wait=0.0)
    clock.now = 610.0
    again = telemetry.report(4, share=0.3, **given)
    assert (again["speed/seconds_per_step"], math.isnan(again["loss/total"])) == (600.0, True)
    assert telemetry._seconds_left(0.3) == pytest.approx(600 * 0.7 / 0.2), "at the pace since the first report"
    telemetry.close()


def test_a_pause_is_not_the_time_of_steps_nor_taken_off_twice_by_a_report_within(tmp_path):
    telemetry = open_telemetry(tmp_path / "run")
    begin = telemetry._since
    with telemetry.paused():
        pass
    assert telemetry._since > begin, "the seconds that a report is of begin later by the pause"
    with telemetry.paused():
        tell(telemetry, 1)
    assert telemetry._since <= time.perf_counter(), "else the next report's seconds would be too few"
    telemetry.close()


def test_sampled_windows_are_files_and_the_same_in_tensorboard(tmp_path):
    telemetry = open_telemetry(tmp_path / "run")
    frames = np.random.default_rng(0).integers(0, 255, (1, 3, 8, 16, 3), dtype=np.uint8)
    actions = np.zeros((1, 2, 5, 2), np.float32)
    for step in (20, 40):
        telemetry.samples(step, Samples(frames=frames, actions=actions, valid=np.ones((1, 5), bool)))
    telemetry.close()
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    files = sorted((tmp_path / "run" / "samples" / "step-00000040").iterdir())
    assert [path.name for path in files] == ["actions_0.png", "video_0.gif"]
    assert board.Tags()["images"] == ["samples/video_0", "samples/actions_0"]
    for path in files:
        shown = board.Images(f"samples/{path.stem}")
        assert [image.step for image in shown] == [20, 40]
        assert shown[1].encoded_image_string == path.read_bytes()
        with Image.open(path) as picture:
            assert picture.size == (shown[1].width, shown[1].height)
            assert getattr(picture, "n_frames", 1) == (3 if path.suffix == ".gif" else 1)
    open_telemetry(tmp_path / "run", first_step=30).close()
    assert [path.name for path in (tmp_path / "run" / "samples").iterdir()] == ["step-00000020"]


def test_images_that_cannot_be_written_are_a_fault_of_the_machine(tmp_path):
    telemetry = open_telemetry(tmp_path / "run")
    (tmp_path / "run" / "samples").write_text("in the way")
    with pytest.raises(MachineFault, match=r"samples: .*start the run again"):
        telemetry.samples(1, Samples(frames=np.zeros((1, 1, 8, 8, 3), np.uint8), actions=None, valid=None))
    telemetry.close()


@pytest.mark.parametrize("name", [LOSSES, METRICS])
def test_a_full_disk_is_a_fault_of_the_machine_with_its_remedy(tmp_path, name):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / name).symlink_to("/dev/full")
    telemetry = open_telemetry(run_dir)
    with pytest.raises(MachineFault) as fault:
        tell(telemetry, 1)
    assert str(fault.value) == f"{run_dir / name}: No space left on device; free some and start the run again"
    telemetry.close()  # what was not written is not told a second time


def test_a_disk_that_fills_up_before_the_end_is_told_at_the_end(tmp_path):
    run_dir = tmp_path / "run"
    telemetry = open_telemetry(run_dir)
    tell(telemetry, 1)
    full = Path("/dev/full").open("a")  # noqa: SIM115 - closed by the telemetry
    full.write("not yet written")
    telemetry._metrics.close()
    telemetry._metrics = full
    with pytest.raises(MachineFault, match="No space left"):
        telemetry.close()


def test_a_run_directory_that_takes_no_files_is_a_fault_of_the_machine(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(MachineFault, match=r"tensorboard: .*start the run again"):
        open_telemetry(tmp_path / "run")


def test_headroom_is_what_the_machine_can_still_give():
    assert 0 < headroom_gb() < 1e5
    assert math.isfinite(headroom_gb())
