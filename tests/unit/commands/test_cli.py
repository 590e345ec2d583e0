"""The command line: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kairos_train import __version__, cli
from kairos_train.basics.errors import RunStopped
from kairos_train.commands import training
from kairos_train.config.compose import load_saved

GOLDEN = "video_token_window.safetensors"


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    program = Path(sys.executable).with_name("kairos-train")
    return subprocess.run([program, *words], capture_output=True, text=True, cwd=cwd)


# --- as a process ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "experiment=demo", "train.stesp=3"], "unknown key 'train.stesp'; did you mean train.steps?"),
        (["config", "model=tinny"], "model=tinny is unknown; did you mean tiny?"),
        (["trian"], "'trian' is unknown; did you mean train?"),
        (["verify", "golden", "nowhere.safetensors"], "nowhere.safetensors: "),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(words, message, tmp_path):
    done = run(*words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"kairos-train: error: {message}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("\n")
    assert list(tmp_path.iterdir()) == []


def test_config_prints_what_reads_back(tmp_path):
    done = run("config", "experiment=demo", "train.steps=40", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "config.yaml").write_text(done.stdout)
    assert load_saved(tmp_path / "config.yaml").train.steps == 40


# --- in this process ---


def refused(capsys, *words: str) -> str:
    """The error line of a command that is refused."""
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("kairos-train: error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("kairos-train: error: ").strip()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["data"], "the following arguments are required: COMMAND"),
        (["data", "pakc"], "'pakc' is unknown; did you mean pack? choose from: simulate, prepare"),
        (["data", "pack"], "the following arguments are required: SOURCE, --out"),
        (["data", "pack", "x", "--out", "y", "--encoed"], "unknown argument '--encoed'; did you mean --encode?"),
        (["data", "simulate", "--env", "push", "--out", "x"], "'push' is unknown; did you mean push2d?"),
        (["export", "a", "b", "--out", "c"], "unknown argument 'b'; kairos-train export has: "),
        (["export", "a", "--out", "b", "--dtype", "fp16"], "'fp16' is unknown; did you mean bf16? choose from: bf16"),
        (["rollout", "x", "--input", "y", "--out", "z", "--count", "0"], "argument --count: 0 is below 1"),
        (["rollout", "x", "--input", "y", "--out", "z", "--count", "many"], "argument --count: "),
        (["train", "--bar"], "unknown argument '--bar'; kairos-train train has: "),
        (["train", "--config-dir", "nowhere", "experiment=demo"], "--config-dir nowhere: no such folder"),
        (["train"], "data.shards has no value; give data.shards=VALUE"),
        (["model", "summary", "experiment=custom"], "model.action.action_dim has no value"),
        (["config", "experiment=demo", "data.window.frames=10"], "data.window.frames=10 is not 4k+1; use 9 or 13"),
        (["demo", "--env", "libero"], "'libero' is unknown; choose from: metaworld, push2d"),
    ],
)
def test_bad_input_is_refused(words, message, capsys):
    assert refused(capsys, *words).startswith(message)


def test_overrides_may_stand_before_and_behind_options(tmp_path, capsys):
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/mine.yaml").write_text("defaults: [joint, _self_]\nname: mine\n")
    assert cli.main(["config", "experiment=demo", "--config-dir", str(tmp_path), "stage=mine", "seed=7"]) == 0
    out = capsys.readouterr().out
    assert "run_dir: runs/demo/mine\n" in out
    assert out.startswith("experiment: demo\nseed: 7\n")


def test_config_shows_what_is_still_missing(capsys):
    assert cli.main(["config", "experiment=custom"]) == 0
    assert "action_dim: ???" in capsys.readouterr().out.replace("'", "")


def test_model_summary_counts_the_published_parameters(capsys):
    assert cli.main(["model", "summary", "model=kairos_4b"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == {"video_dit": 4_046_680_960, "action_dit": 955_849_742}
    assert found["keys"] == 1785


@pytest.mark.parametrize(("model", "least", "most"), [("tiny", 1e6, 2e6), ("small", 90e6, 115e6)])
def test_the_small_models_have_the_sizes_they_claim(model, least, most):
    from kairos_train.config.compose import load_config
    from kairos_train.model.summary import meta_model, parameter_counts

    config = load_config(["experiment=demo", f"model={model}"])
    assert least < sum(parameter_counts(meta_model(config.model)).values()) < most


def test_golden_file_within_its_tolerances_passes(shared, capsys):
    assert cli.main(["verify", "golden", str(shared / "golden" / GOLDEN)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["files"].values()
    assert found["ok"]
    assert 0 < found["outputs"] < 1e-5


@pytest.mark.parametrize("tolerance", ["--tolerance-outputs", "--tolerance-gradients"])
def test_golden_file_beyond_a_tolerance_fails_with_exit_code_1(tolerance, shared, capsys):
    assert cli.main(["verify", "golden", str(shared / "golden" / GOLDEN), tolerance, "1e-12"]) == 1
    (found,) = json.loads(capsys.readouterr().out)["files"].values()
    assert found["ok"] is False


def test_pack_stores_the_windows_of_the_configuration(shared, tmp_path, capsys):
    from dataloaders.shards import read_index

    source, out = shared / "samples/lerobot_v30_metaworld", tmp_path / "shards"
    words = ["data", "pack", str(source), "--out", str(out), "--encode", "experiment=demo"]
    words += ["data.window.cameras=[]", "data.window.stride=16", "data.window.height=32", "data.window.width=32"]
    assert cli.main(words) == 0
    index = read_index(out)
    printed = json.loads(capsys.readouterr().out)
    assert (printed["samples"], printed["shards"], printed["out"]) == (index.samples, len(index.shards), str(out))
    assert index.window.frames == 5
    assert index.encoders["text"]["kind"] == "hashed_ngrams"
    assert (out / "empty_context.npy").is_file()


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"kairos-train {__version__}\n"


@pytest.mark.parametrize(
    ("error", "code"), [(RunStopped("step 3: loss nan\nis not finite"), 3), (KeyboardInterrupt(), 130)]
)
def test_a_stopped_run_is_one_line_with_its_own_exit_code(error, code, monkeypatch, capsys):
    def stop(args):
        raise error

    monkeypatch.setattr(training, "run_config", stop)
    assert cli.main(["config"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_of_the_project_keeps_its_traceback_without_secrets(monkeypatch, capsys):
    def fail(args):
        raise RuntimeError("a fault at https://user:SECRET@host/a?signature=SECRET")

    monkeypatch.setattr(training, "run_config", fail)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError, match="a fault") as caught:
        cli.main(["config"])
    sys.excepthook(caught.type, caught.value, caught.tb)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "RuntimeError: a fault at https://host/a"
