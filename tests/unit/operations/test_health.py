"""Parts of the health check, and the command on this machine alone; several processes: tests/distributed."""

import json
import os
from pathlib import Path

import pytest
import torch

from kairos_train.basics.errors import MachineFault
from kairos_train.cli import main
from kairos_train.operations.preflight.agreement import different_versions, leaves, name_ranks, versions
from kairos_train.operations.preflight.devices import list_gpus, parse_gpus
from kairos_train.operations.preflight.disk import CHUNK, existing_folder, free_bytes, measure_speed
from kairos_train.operations.preflight.health import HealthReport, RankHealth, find_failures

SMI = """\
0, GPU-5f1c0a52-0000-1111-2222-333344445555, NVIDIA H100 80GB HBM3, 4, 81559, 0, 0, 550.54.15
1, GPU-6a2d1b63-0000-1111-2222-333344445555, NVIDIA H100 80GB HBM3, 30210, 81559, 97, 2, 550.54.15
2, GPU-7b3e2c74-0000-1111-2222-333344445555, NVIDIA GeForce RTX 3090, 1, 24576, [N/A], [N/A], 550.54.15
"""


def test_gpus_in_use_or_with_memory_errors_are_told_from_idle_ones():
    idle, bad, uncounted = parse_gpus(SMI)
    assert (idle.problems(), uncounted.problems()) == ([], [])
    assert (uncounted.utilisation, uncounted.ecc_errors) == (None, None)
    memory, busy, errors = bad.problems()
    assert memory.startswith("others use 31.7 GB")
    assert "97 %" in busy
    assert errors.startswith("2 uncorrected")


@pytest.mark.parametrize(
    ("script", "match"),
    [
        (None, "nvidia-smi is not installed"),
        ("echo NVIDIA-SMI has failed >&2; exit 9", r"failed \(exit code 9\): NVIDIA-SMI has failed"),
        ("echo No devices were found", "nvidia-smi printed 'No devices were found' where index, uuid"),
    ],
)
def test_a_driver_that_does_not_answer_as_it_should_is_one_line(tmp_path, monkeypatch, script, match):
    monkeypatch.setenv("PATH", str(tmp_path))
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    with pytest.raises(MachineFault, match=match):
        list_gpus()


def test_a_disk_is_measured_and_nothing_stays_on_it(tmp_path):
    speed = measure_speed(tmp_path, 3 * CHUNK)
    assert speed.write > 0
    assert speed.read > 0
    assert list(tmp_path.iterdir()) == []
    assert existing_folder(tmp_path / "not/there") == tmp_path
    stats = os.statvfs(tmp_path)
    assert free_bytes(tmp_path / "not/there") == pytest.approx(stats.f_bavail * stats.f_frsize, rel=0.1)


def test_nested_settings_are_named_to_their_last_part():
    tree = {"a": {"b": [1, {"c": 2}], "d": []}, "e": None}
    assert leaves(tree) == {"a.b.0": 1, "a.b.1.c": 2, "a.d": [], "e": None}


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2, 4, 6, 8], "ranks 0, 2, 4, 6 and 1 more")],
)
def test_ranks_are_named_in_short(ranks, text):
    assert name_ranks(ranks) == text


def test_the_node_with_another_version_is_named():
    common = {"python": "3.11.7", "torch": "2.11.0"}
    nodes = [common, common, {**common, "torch": "2.12.0"}, common]
    assert different_versions([common] * 4, ["a", "a", "b", "b"]) is None
    line = different_versions(nodes, ["a", "b", "c", "d"])
    assert line.startswith("torch is 2.11.0 on a, b, d and 2.12.0 on c: all nodes must run the same versions")
    assert different_versions([common, {"python": "3.11.7"}], ["a", "b"]).startswith(
        "torch is 2.11.0 on a and absent on b"
    )


def test_the_code_itself_is_among_the_versions():
    found = versions()
    assert found["torch"] == torch.__version__
    assert found == versions()
    assert len(found["code"]) == 12


def test_whatever_brings_kernels_is_among_the_versions(tmp_path, monkeypatch):
    names = ("triton", "fla_core", "flash_linear_attention", "tilelang", "flash_attn", "transformer_engine")
    for number, name in enumerate(names):
        (tmp_path / f"{name}-9.{number}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.{number}\n"
        (tmp_path / f"{name}-9.{number}.dist-info/METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    found = versions()
    assert {name: found.get(name.replace("_", "-")) for name in names} == {n: f"9.{i}" for i, n in enumerate(names)}


def test_clocks_and_devices_that_differ_are_failures_of_their_hosts():
    ranks = [
        RankHealth(0, "a", device="cuda", offset=0.0),
        RankHealth(1, "b", device="cuda", offset=-7.25),
        RankHealth(2, "b", device="cuda", offset=-7.25),
        RankHealth(3, "c", device="cpu", offset=0.5),
    ]
    (device, where, text), (clock, host, offset) = find_failures(ranks)
    assert (device, where) == ("device", "c")
    assert "no GPU here, but elsewhere" in text
    assert (clock, host) == ("clock", "b")
    assert offset.startswith("7.2 s behind a;")
    report = HealthReport("runs", ranks, find_failures(ranks))
    assert not report.ok
    assert "FAILED      clock: b: 7.2 s behind a" in report.table()
    assert report.table().endswith("4 process(es) on 3 host(s): 2 check(s) failed")


@pytest.fixture
def health(capsys, monkeypatch):
    """`kairos-train healthcheck` in this process: its exit code and output."""

    def run(*arguments: object) -> tuple[int, str]:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        code = main(["healthcheck", *map(str, arguments)])
        return code, capsys.readouterr().out

    return run


def test_a_healthy_machine_without_gpu_has_a_table_and_exit_code_0(health, tmp_path):
    code, out = health("--device", "cpu", "--dir", tmp_path / "run")
    assert code == 0, out
    assert "GB/s" in out
    assert "all-reduce of 16 MiB by gloo over 1 process(es): right" in out
    assert out.endswith("1 process(es) on 1 host(s): healthy\n")
    assert list(tmp_path.iterdir()) == []


def test_failed_checks_are_named_with_their_host_and_exit_code_1(health):
    code, out = health("--device", "cpu", "--dir", "/proc", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["ok"] is False
    (failure,) = found["failed"]
    assert failure["check"] == "disk"
    assert failure["where"] == f"{found['ranks'][0]['host']} (rank 0)"
    assert failure["text"].startswith("/proc: 0.00 GB are free")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_one_line(health, tmp_path):
    code, out = health("--device", "cuda", "--dir", tmp_path)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert "device: " in line
    assert "torch sees no GPU" in line
    assert Path("/proc/driver/nvidia").exists() or "cuda driver absent" in out
