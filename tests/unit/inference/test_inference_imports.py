"""`kairos_train.inference` in an interpreter that has torch, numpy, safetensors and nothing else."""

import ast
import subprocess
import sys

import pytest
from support.alone import ALONE, installed_with
from support.tiny_export import write_tiny_checkpoint

from kairos_train.weights.export import export

PREDICT = """
import torch
torch.set_num_threads(1)
import numpy as np
from kairos_train.inference.load import load
from kairos_train.inference.predict import Predictor
for folder in sys.argv[1:]:
    predictor = Predictor(load(folder))
    for mode in ("action", "joint"):
        chunk = predictor.predict(np.zeros((32, 32, 3), np.uint8), np.zeros(2), "go", seed=0, mode=mode)
        print(mode, chunk.actions.shape)
project = ("kairos_train", "parallel", "dataloaders", "evaluation", "benchmarks", "configs")
print(sorted({".".join(n.split(".")[:2]) for n in sys.modules if n.partition(".")[0] in project}))
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    alone = ALONE.format(distributions=installed_with(["torch", "numpy", "safetensors"]))
    return subprocess.run([sys.executable, "-c", alone + code, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("alone")
    checkpoint = write_tiny_checkpoint(folder / "checkpoints", shards)
    export(checkpoint, folder / "plain")
    export(checkpoint, folder / "int4", quantize="int4")
    return [str(folder / "plain"), str(folder / "int4")]


def test_an_export_loads_and_predicts_with_torch_numpy_and_safetensors_alone(folders):
    done = run(PREDICT, *folders)
    assert done.returncode == 0, done.stderr
    *chunks, modules = done.stdout.splitlines()
    assert chunks == ["action (8, 3)", "joint (8, 3)"] * 2
    rooms = {"basics", "conditioning", "config", "inference", "model", "objective"}
    settings = {"parallel", "parallel.config", "dataloaders", "dataloaders.config"}
    assert set(ast.literal_eval(modules)) <= {"kairos_train", *(f"kairos_train.{room}" for room in rooms), *settings}


def test_other_packages_are_absent_in_that_interpreter():
    packages = ("hydra", "deepspeed", "webdataset", "PIL", "av", "yaml", "pytest")
    code = f"""
for name in {packages!r}:
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""
    assert run(code).stdout.split() == list(packages)
