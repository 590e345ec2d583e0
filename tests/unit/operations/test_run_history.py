"""What a run's folder tells of it: lives, progress, time spent, health."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console
from support.run_folders import PACE, STALL, START, STARTING, VALIDATION, WAIT, RunFolder
from support.terminal import on_a_terminal

from kairos_train import cli
from kairos_train.basics.errors import UserError
from kairos_train.basics.format import span
from kairos_train.operations.prometheus import TextFile
from kairos_train.operations.reports.curves import ceiling, sparkline
from kairos_train.operations.reports.history import read_histories, read_history
from kairos_train.operations.reports.records import abandoned, find_runs
from kairos_train.operations.reports.status import render, summary

STEP, WAITED = PACE * (1 - WAIT), PACE * WAIT


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


def read(run, *, later: float = 0.0):
    """The run as it is seen so many seconds after its clock; its files are as old as its clock says."""
    for path in run.folder.iterdir():
        if path.is_file():
            os.utime(path, (run.time, run.time))
    return read_history(run.folder, now=run.time + later)


def reasons(history):
    return [reason.text for reason in history.health.reasons]


def shown(*histories):
    console = Console(file=io.StringIO(), width=120)
    console.print(render(histories))
    return console.file.getvalue()


# --- where the time went ---


def test_every_second_of_a_run_without_faults_is_accounted_for(run):
    run.start()
    run.go(200)
    run.stop("finished")
    spent = read(run).goodput.seconds
    expected = {
        "training": 200 * STEP,
        "data": 200 * WAITED,
        "checkpoint": 10 * STALL,
        "validation": 5 * VALIDATION,
        "starting": STARTING,
    }
    assert {kind: seconds for kind, seconds in spent.items() if seconds} == pytest.approx(expected)


def test_steps_that_a_killed_life_did_for_nothing_are_lost_time(run):
    run.start()
    run.go(57)  # saved: 40; reported: 50
    run.time += 100
    run.start()
    run.go(80)
    history = read(run)
    spent = history.goodput.seconds
    assert spent["training"] == pytest.approx(80 * STEP)
    assert spent["redone"] == pytest.approx(17 * PACE)
    assert spent["down"] == pytest.approx(100)
    assert spent["starting"] == pytest.approx(2 * STARTING)
    assert history.goodput.total == pytest.approx(run.time - START)
    assert [(life.outcome, life.redone) for life in history.lives] == [("killed", 17), ("", None)]


def test_steps_whose_report_died_with_their_life_count_at_the_pace_of_the_report_before(run):
    run.start()
    run.go(25)
    run.checkpoint()  # at step 25: the report of steps 21 to 30 never comes
    run.go(28)
    run.start()
    run.go(40)
    spent = read(run).goodput.seconds
    assert spent["training"] == pytest.approx(40 * STEP)
    assert spent["redone"] == pytest.approx(3 * PACE)


def test_without_a_word_on_the_killed_life_its_lost_steps_count_as_down(run):
    run.start()
    run.go(57)
    run.time += 100
    run.start(tell_redone=False)
    run.go(80)
    spent = read(run).goodput.seconds
    assert spent["training"] == pytest.approx(80 * STEP)
    assert spent["redone"] + spent["down"] == pytest.approx(100 + 17 * PACE)


def test_loading_is_part_of_starting_where_the_run_tells_when_it_began(run):
    run.time += 50
    run.start(begun=START)
    run.go(20)
    assert read(run).goodput.seconds["starting"] == pytest.approx(50 + STARTING)


def test_dropped_steps_are_not_useful(run):
    run.start()
    run.go(20, skipped=2)
    spent = read(run).goodput.seconds
    assert spent["dropped"] == pytest.approx(4 * STEP)
    assert spent["training"] == pytest.approx(16 * STEP)


def test_what_a_rollback_throws_away_is_lost_time(run):
    from kairos_train.training.measure.telemetry import drop_later_lines

    run.start()
    run.go(38)
    for name in ("losses.jsonl", "metrics.jsonl"):
        drop_later_lines(run.folder / name, 20)
    run.event("rollback", step=38, to=20, rollbacks=1)
    run.step = run.reported = 20
    run.go(50)
    history = read(run)
    assert [(report.step, report.steps) for report in history.record.reports] == [
        (10, 10), (20, 10), (30, 10), (40, 10), (50, 10)
    ]  # fmt: skip
    assert history.goodput.seconds["training"] == pytest.approx(50 * STEP)
    assert history.goodput.seconds["redone"] == pytest.approx(18 * PACE)
    assert any("1 rollback (of 2), last from step 38 to 20" in text for text in reasons(history))


def test_a_run_that_goes_on_is_counted_up_to_now(run):
    run.start()
    run.go(40)
    assert read(run, later=30).goodput.total == pytest.approx(run.time + 30 - START)


# --- what it is doing ---


def test_fresh_signs_mean_running_and_none_mean_silent(run):
    run.start()
    run.go(50)
    assert read(run, later=5).state.name == "running"
    silent = read(run, later=4000)
    assert silent.state.name == "silent"
    assert silent.health.level == "trouble"
    assert "no sign of life for 1 h 6 min" in reasons(silent)[0]


def test_a_life_without_a_step_is_starting_as_long_as_it_may_be_stuck(run):
    run.start()
    assert read(run, later=1000).state.name == "starting"
    assert read(run, later=1900).state.name == "silent"


def test_a_process_that_is_gone_from_this_machine_was_killed(run):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    run.start(host=os.uname().nodename, pid=process.pid)
    run.go(20)
    history = read(run)
    assert history.state.name == "killed"
    assert "start it again" in reasons(history)[0]


@pytest.mark.parametrize(
    ("outcome", "level"),
    [
        ("finished", "healthy"),
        ("interrupted", "look"),
        ("stopped", "trouble"),
        ("fault", "trouble"),
        ("error", "trouble"),
    ],
)
def test_a_run_that_said_how_it_ended_is_believed(run, outcome, level):
    run.start()
    run.go(40)
    run.stop(outcome, "because of that")
    run.real_checkpoint()
    history = read(run, later=1e6)
    assert (history.state.name, history.health.level) == (outcome, level)
    assert history.state.text == "because of that"
    assert outcome in shown(history)
    assert reasons(history) == ([] if outcome == "finished" else ["because of that"])


def test_time_left_is_by_the_clock_pauses_included(run):
    run.start()
    run.go(120)
    progress = read(run).progress
    assert (progress.step, progress.share, progress.budget) == (120, 0.6, "200 steps")
    pauses = 4 * STALL + 2 * VALIDATION  # of 80 steps
    assert progress.left == pytest.approx(80 * PACE + pauses, rel=0.1)


def test_time_left_of_a_run_that_has_ended_is_not_counted_down(run):
    run.start()
    run.go(200)
    run.stop("finished")
    assert read(run).progress.left is None


# --- whether it is well ---


def test_a_run_without_faults_is_healthy_save_for_its_waiting(run):
    run.start()
    run.go(40)
    run.real_checkpoint()
    assert reasons(read(run)) == ["25% of the time waits for data; raise data.workers, or look at the disk"]


@pytest.mark.parametrize(
    ("kind", "fields", "level", "text"),
    [
        (
            "skipped",
            {"step": 39, "why": "a loss spike"},
            "look",
            "1 step of the last 100 dropped (budget 10): 1 × a loss",
        ),
        (
            "checkpoint_failed",
            {"step": 40, "error": "disk full"},
            "trouble",
            "1 checkpoint in a row could not be written",
        ),
        ("passed_over", {"problem": "truncated"}, "look", "1 damaged checkpoint skipped"),
        ("straggler", {"step": 30, "rank": 3, "host": "n1", "factor": 2.0}, "look", "rank 3 on n1 is slower"),
        ("loader_stall", {"step": 30, "seconds": 45.0}, "look", "the loader stalled 1 time, up to 45 s"),
        ("memory", {"used_gb": 138.0, "total_gb": 140.0, "text": ""}, "look", "memory is nearly full: 2 of 140"),
        ("rollback", {"step": 40, "to": 20, "rollbacks": 2}, "trouble", "1 rollback (of 2)"),
    ],
)
def test_what_happened_to_a_run_is_a_reason_to_look(run, kind, fields, level, text):
    run.start()
    run.go(40)
    run.real_checkpoint()
    run.event(kind, **fields)
    found = [reason for reason in read(run).health.reasons if text in reason.text]
    assert [reason.level for reason in found] == [level]


def test_a_checkpoint_that_was_written_after_failed_ones_calms(run):
    run.start()
    run.go(30)
    run.event("checkpoint_failed", step=20, error="disk full")
    run.time += 1
    run.go(40)
    run.real_checkpoint()
    (found,) = [reason for reason in read(run).health.reasons if "could not be written" in reason.text]
    assert (found.level, found.text) == ("look", "1 checkpoint could not be written, later ones could")


def test_old_skips_are_forgiven_and_many_are_trouble(run):
    run.start()
    run.go(20)
    for step in range(1, 8):
        run.event("skipped", step=step, why="not finite")
    assert any("7 steps of the last 100" in text for text in reasons(read(run)))
    assert read(run).health.level == "trouble"
    run.go(180)
    run.real_checkpoint()
    assert not any("dropped" in text for text in reasons(read(run)))


def test_a_loss_that_is_not_finite_is_trouble(run):
    run.start()
    run.go(20)
    run.line("losses.jsonl", {"step": 21, "loss": float("nan"), "grad_norm": 1.0})
    history = read(run)
    assert "the last step's loss is not finite" in reasons(history)
    json.loads(json.dumps(summary(history), allow_nan=False))


def test_the_newest_valid_checkpoint_is_told_and_damaged_newer_ones_are_named(run):
    run.start()
    run.go(20)
    run.real_checkpoint()
    run.go(40)
    (run.real_checkpoint() / "manifest.json").write_text("{")
    history = read(run)
    assert (history.checkpoints.step, history.checkpoints.count) == (20, 2)
    assert any("step-00000040 is skipped" in text for text in reasons(history))


def test_a_run_far_beyond_its_newest_checkpoint_is_in_trouble(run):
    run.start()
    run.go(20)
    run.real_checkpoint()
    run.go(80)
    assert any("saves every 20" in text for text in reasons(read(run)))


# --- folders ---


def test_lines_that_a_kill_cut_off_or_a_disk_spoilt_are_left_out(run):
    run.start()
    run.go(25)
    for name in ("metrics.jsonl", "losses.jsonl", "events.jsonl"):
        with (run.folder / name).open("ab") as file:
            file.write(b'\xff\n{"time": "now", "life": [], "kind": "start", "step": "x"}\n{"step": 99, "ti')
    history = read(run)
    assert (history.progress.step, len(history.record.reports), len(history.lives)) == (25, 2, 1)


def test_a_run_of_before_is_shown_as_far_as_it_goes(run):
    run.start()
    run.go(120)
    (run.folder / "events.jsonl").unlink()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({k: v for k, v in line.items() if k != "time"}) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text)
    history = read(run, later=1e5)
    assert (history.state.name, history.progress.step, history.progress.share) == ("unknown", 120, 0.6)
    assert history.progress.left == pytest.approx(80 * PACE)
    assert (history.goodput, history.lives, summary(history)["restarts"]) == (None, [], None)
    assert "events.jsonl" in history.unknown[0]
    assert "metrics.jsonl has no times" in history.unknown[1]
    assert "not known" in shown(history)


def test_a_folder_of_stages_gives_them_in_the_order_in_which_they_follow(tmp_path):
    for name, before in (("a_last", "b_middle"), ("b_middle", "c_first"), ("c_first", None)):
        origin = before and str(tmp_path / "runs" / before)
        run = RunFolder(tmp_path / "runs" / name, config={"stage": {"init_from": origin}})
        run.start()
        run.go(20)
    (tmp_path / "runs" / "shards").mkdir()
    assert [path.name for path in find_runs(tmp_path / "runs")] == ["c_first", "b_middle", "a_last"]
    histories = read_histories([tmp_path / "runs"], now=run.time)
    assert [history.name for history in histories] == ["c_first", "b_middle", "a_last"]


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for parent in ("one", "two"):
        run = RunFolder(tmp_path / parent / "joint")
        run.start()
        run.go(10)
    names = [history.name for history in read_histories([tmp_path / "one", tmp_path / "two"], now=run.time)]
    assert names == ["one/joint", "two/joint"]


@pytest.mark.parametrize("command", ["status", "report"])
@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_a_run_is_one_line(tmp_path, capsys, command, there):
    folder = tmp_path if there else tmp_path / "nowhere"
    arguments = [command, str(folder), *(["--out", str(tmp_path / "page.html")] if command == "report" else [])]
    assert cli.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(folder) in line
    assert "run_dir" in line


def test_of_steps_that_stand_twice_in_a_file_the_later_line_counts(run):
    run.start()
    run.go(40)
    run.line("metrics.jsonl", {"step": 20, "time": run.time, "speed/seconds_per_step": 5.0})
    assert [(report.step, report.steps) for report in read(run).record.reports] == [(10, 10), (20, 10)]


def test_what_a_life_is_going_to_do_again_is_counted_before_it_starts(run):
    assert abandoned(run.folder, 0) == {}
    run.start()
    run.go(27)
    assert abandoned(run.folder, 20)["redone"] == 7
    assert abandoned(run.folder, 27)["redone"] == 0


# --- the command ---


def test_status_shows_a_run_and_gives_it_as_data(run, capsys, monkeypatch):
    run.start()
    run.go(57)
    run.time += 100
    run.start()
    run.go(80)
    run.event("skipped", step=80, why="a loss spike", loss=9.0, grad_norm=3.0)
    run.stop("interrupted", "asked to stop (SIGUSR1)")
    text = on_a_terminal(monkeypatch, "status", run.folder)
    for part in (
        "interrupted",
        "step 80 of 200  40.0%",
        "goodput",
        "1 restart",
        "killed",
        "a loss spike",
        "asked to stop",
    ):
        assert part in text
    assert cli.main(["status", str(run.folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["runs"]
    assert (found["state"], found["step"], found["restarts"], found["health"]) == ("interrupted", 80, 1, "look")
    assert found["seconds"]["total"] == pytest.approx(run.time - START)
    assert found["goodput"] == pytest.approx(found["seconds"]["training"] / found["seconds"]["total"])


def test_status_of_several_runs_is_a_table_with_details_of_those_that_go_on(tmp_path):
    histories = []
    for name in ("done", "going"):
        run = RunFolder(tmp_path / name)
        run.start()
        run.go(200 if name == "done" else 40)
        if name == "done":
            run.stop("finished")
        histories.append(read(run))
    text = shown(*histories)
    assert text.count("last sign of life") == 1
    assert "done" in text
    assert "step 40 of 200  20.0%" in text


def test_status_is_drawn_into_a_file(run, tmp_path, capsys):
    run.start()
    run.go(40)
    assert cli.main(["status", str(run.folder), "--svg", str(tmp_path / "status.svg")]) == 0
    assert "</svg>" in (tmp_path / "status.svg").read_text()


def test_watching_excludes_what_is_written_once(run, capsys):
    run.start()
    assert cli.main(["status", str(run.folder), "--watch", "5", "--json"]) == 2
    assert "--watch" in capsys.readouterr().err


def test_a_sparkline_has_gaps_for_what_is_not_finite():
    assert sparkline([1.0, 2.0, float("nan"), 8.0], 8) == "▁▂?█"
    assert sparkline([3.0, 3.0], 8) == "▁▁"
    assert sparkline([], 8) == ""
    assert len(sparkline(list(range(1000)), 30)) == 30


def test_a_spike_does_not_hide_the_rest_of_a_curve():
    values = [4.0, 3.0, 2.0, 1.0] * 5
    values[7] = 1e6
    assert sparkline(values, 20)[:8] == "█▆▃▁█▆▃▲"
    assert ceiling(values) == pytest.approx(12.0)
    assert ceiling([4.0, 3.0, 2.0, 1.0]) is None
    assert ceiling([float("nan")]) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.2 s"), (59.7, "1 min"), (75, "1 min 15 s"), (7500, "2 h 5 min"), (86400, "1 d"), (180000, "2 d 2 h")],
)
def test_lengths_of_time_have_their_two_largest_units(seconds, text):
    assert span(seconds) == text


# --- Prometheus ---


def parsed(path):
    from prometheus_client.parser import text_string_to_metric_families

    samples = [sample for family in text_string_to_metric_families(path.read_text()) for sample in family.samples]
    return {(s.name, *(v for k, v in sorted(s.labels.items()) if k != "run")): s.value for s in samples}, samples


def test_prometheus_reads_back_every_number(tmp_path):
    path = tmp_path / "kairos.prom"
    file = TextFile(path, labels={"run": 'a "b"\\n'}, counts={"skipped": 2}, say=pytest.fail, clock=lambda: 5.0)
    file.update(10, {"speed/mfu": 0.4, "loss/total": float("nan"), "loss_by_sigma/video_0.0-0.2": 1e-9})
    file.count("skipped")
    file.update(20, {"validation_ema/video": float("inf"), "communication/tensor": 0.125})
    values, samples = parsed(path)
    assert values["kairos_train_speed_mfu",] == 0.4
    assert values["kairos_train_step",] == 20
    assert values["kairos_train_running",] == 1
    assert values["kairos_train_last_report_timestamp_seconds",] == 5.0
    assert values["kairos_train_loss_by_sigma", "video_0.0-0.2"] == 1e-9
    assert values["kairos_train_validation_loss_ema", "video"] == float("inf")
    assert values["kairos_train_communication_seconds", "tensor"] == 0.125
    assert values["kairos_train_events_total", "skipped"] == 3
    assert values["kairos_train_loss_total",] != values["kairos_train_loss_total",]
    assert {sample.labels["run"] for sample in samples} == {'a "b"\\n'}
    assert all(sample.timestamp is None for sample in samples)
    file.close()
    assert parsed(path)[0]["kairos_train_running",] == 0
    assert [found.name for found in tmp_path.iterdir()] == ["kairos.prom"]


def test_a_name_that_node_exporter_would_not_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"monitor.prometheus_file=.*\*\.prom"):
        TextFile(tmp_path / "kairos.txt", labels={}, say=print)
    with pytest.raises(UserError, match=r"nowhere is no folder"):
        TextFile(tmp_path / "nowhere" / "kairos.prom", labels={}, say=print)


def test_a_file_that_cannot_be_written_is_told_once_and_does_not_end_the_run(tmp_path):
    told = []
    folder = tmp_path / "metrics"
    folder.mkdir()
    file = TextFile(folder / "kairos.prom", labels={}, say=told.append)
    folder.rmdir()
    file.update(1, {})
    file.update(2, {})
    assert len(told) == 1
    assert "monitor.prometheus_file" in told[0]
    folder.mkdir()
    file.update(3, {})
    assert (folder / "kairos.prom").is_file()


@pytest.mark.parametrize("text", ["a: 'b\n", "a: " + "[" * 100_000, "a: " + "9" * 5000 + "\n", "a: &a [*a]\n"])
def test_a_configuration_that_cannot_be_read_is_one_line(run, text):
    run.start()
    (run.folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        read(run)
    assert "\n" not in str(error.value)
