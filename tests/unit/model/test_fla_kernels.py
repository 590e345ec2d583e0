"""fla's real kernels and our way of calling them, without a GPU: under Triton's interpreter, in float32.

Elsewhere fla is a function that notes its arguments, or runs on GPUs alone. The wheels are fetched by pip into a
temporary folder, and two lines of that copy changed: the interpreter's loop counters are integers of Python.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.nightly

TESTS = Path(__file__).resolve().parents[2]
WHEELS = ("triton==3.9.0", "fla-core==0.6.0", "flash-linear-attention==0.6.0")
CHANGES = {
    "fla/ops/common/chunk_delta_h.py": ("i_t_int64 = i_t.to(tl.int64)", "i_t_int64 = i_t", 2),
    "fla/ops/common/chunk_o.py": ("(B * T).to(tl.int64)", "B * T", 1),
}
"""File → what stands there, what the interpreter takes, and how often."""


@pytest.fixture(scope="module")
def departures(tmp_path_factory):
    """By kernels ("fla", "replaced"), case and name: the relative error."""
    folder = tmp_path_factory.mktemp("fla")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--retries", "1", "--target", str(folder), *WHEELS], capture_output=True, text=True, timeout=900
    )
    if done.returncode:
        pytest.skip(f"pip does not give {', '.join(WHEELS)}: {(done.stderr.splitlines() or ['no word'])[-1]}")
    for name, (old, new, times) in CHANGES.items():
        text = (folder / name).read_text()
        assert text.count(old) == times, f"{name} is not the one that this was written for"
        (folder / name).write_text(text.replace(old, new))
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    paths = [str(folder), str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", "support.fla_interpreter"],
        env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernels", ["fla", "replaced"])
def test_outputs_states_and_six_gradients_are_those_of_the_rule(departures, kernels):
    cases = {case: errors for case, errors in departures[kernels]["errors"].items() if case != "two shards"}
    assert len(cases) == 5
    assert {len(errors) for errors in cases.values()} == {8}
    wrong = {(case, name): e for case, errors in cases.items() for name, e in errors.items() if not e < 2e-6}
    assert wrong == {}


def test_the_step_for_hopper_gpus_ran_in_place_of_flas_and_only_where_asked_for(departures):
    assert departures["fla"]["calls"] == 0
    assert departures["replaced"]["calls"] == 5


@pytest.mark.parametrize("kernels", ["fla", "replaced"])
def test_states_pass_between_two_shards_of_flas_kernels(departures, kernels):
    ranks = departures[kernels]["errors"]["two shards"]
    names = {name for rank in ranks for case in rank for name in case}
    assert {"output after the cut", "gradient of initial state", "gradient of g after the cut"} < names
    assert [{n: e for n, e in case.items() if not e < 5e-6} for rank in ranks for case in rank] == [{}] * 6
