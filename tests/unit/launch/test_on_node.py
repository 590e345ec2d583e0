"""A node's copy of a job's code: new in each step, and nobody else's to change."""

import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHOW = 'echo "$PYTHONPATH"; cat "$PYTHONPATH/mark.py"; echo " $PYTHONSAFEPATH $TORCHINDUCTOR_CACHE_DIR $$"'
OTHER = 4321
"""The number of another user."""


def make_job(parent: Path) -> Path:
    """A job's folder with its code."""
    (parent / "job").mkdir()
    shutil.copy(ROOT / "slurm/on_node.sh", parent / "job")
    (parent / "mark.py").write_text("ours")
    with tarfile.open(parent / "job/code.tar.gz", "w:gz") as tar:
        tar.add(parent / "mark.py", arcname="mark.py")
    return parent / "job"


@pytest.fixture
def job(tmp_path) -> Path:
    return make_job(tmp_path)


def step(job: Path, scratch: Path, *before: object) -> subprocess.CompletedProcess:
    """What a step of job 9 in its first attempt does on node 2.

    Args:
        before: words in front of the command line.
    """
    environment = os.environ | {"SLURM_JOB_ID": "9", "SLURM_NODEID": "2", "PYTHONPATH": ""}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [*before, "bash", job / "on_node.sh", scratch, "bash", "-c", SHOW]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_each_step_of_a_job_unpacks_the_code_into_a_new_private_folder(job, tmp_path):
    scratch = tmp_path / "made" / "scratch"
    codes = []
    for _ in range(2):
        code, text, safe, cache, _ = step(job, scratch).stdout.split()
        assert (text, safe, cache) == ("ours", "1", f"{code}/.torchinductor")
        assert re.fullmatch(rf"{scratch}/kairos-train-9-0-2\.\w{{6}}", code)
        assert Path(code).stat().st_mode & 0o777 == 0o700
        (Path(code) / "mark.py").write_text("changed")  # no later step finds this
        codes.append(code)
    assert codes[0] != codes[1]
    assert scratch.stat().st_mode & 0o777 == 0o700


def test_the_command_takes_the_place_of_the_script(job, tmp_path):
    environment = os.environ | {"SLURM_JOB_ID": "9", "SLURM_NODEID": "2"}
    command = ["bash", job / "on_node.sh", tmp_path / "scratch", "bash", "-c", "echo $$"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.read().split() == [str(process.pid)]


def test_code_that_lies_where_a_job_would_unpack_is_not_run(job, tmp_path):
    scratch = tmp_path / "scratch"
    planted, elsewhere = scratch / "kairos-train-9-0-2", tmp_path / "elsewhere"
    for folder in (planted, elsewhere):
        folder.mkdir(parents=True)
        (folder / "mark.py").write_text("theirs")
    assert "ours" in step(job, scratch).stdout
    shutil.rmtree(planted)
    planted.symlink_to(elsewhere)
    assert "ours" in step(job, scratch).stdout
    assert (elsewhere / "mark.py").read_text() == "theirs"


@pytest.mark.skipif(os.geteuid() != 0, reason="folders of another user need root")
@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_folder_of_another_user_is_refused(job, tmp_path, below):
    (tmp_path / "scratch" / below).mkdir(parents=True)
    os.chown(tmp_path / "scratch", OTHER, OTHER)
    refused = step(job, tmp_path / "scratch" / below)
    assert refused.returncode == 2
    assert f"{tmp_path}/scratch belongs to another user ({OTHER}); name a folder of your own" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not list((tmp_path / "scratch" / below).glob("kairos-train-*"))


@pytest.mark.parametrize(("mode", "fine"), [(0o777, False), (0o775, False), (0o1777, True), (0o755, True)])
def test_a_folder_that_others_may_write_to_needs_its_sticky_bit(job, tmp_path, mode, fine):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(mode)
    done = step(job, tmp_path / "scratch")
    assert (done.returncode == 0) == fine
    if not fine:
        assert f"others may write to {tmp_path}/scratch (mode {mode:o}); name a folder" in done.stderr


def test_a_symbolic_link_is_refused_with_where_it_leads(job, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "scratch").symlink_to("real")
    refused = step(job, tmp_path / "scratch")
    assert refused.returncode == 2
    assert f"is a symbolic link to {tmp_path}/real; name a folder" in refused.stderr
    assert list((tmp_path / "real").iterdir()) == []


def test_in_a_container_without_a_root_the_folders_of_root_are_taken():
    """There the system's folders belong to the overflow user, whom nothing else tells from root."""
    unshare = ["unshare", "--user", "--map-current-user"]
    if os.geteuid() == 0:  # as a user, who sees root's folders as nobody's
        unshare = ["setpriv", f"--reuid={OTHER}", f"--regid={OTHER}", "--clear-groups", *unshare]
    if shutil.which(unshare[0]) is None or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no user namespaces here")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to that user
        job = make_job(Path(folder))
        if os.geteuid() == 0:
            os.chown(folder, OTHER, OTHER)
        done = step(job, Path(folder) / "scratch", *unshare)
    assert done.returncode == 0, done.stderr
    assert "ours" in done.stdout


def test_finish_removes_what_the_steps_of_this_attempt_made(tmp_path):
    text = (ROOT / "slurm/functions.sh").read_text()
    find = re.search(r"'(find .*?)' \{\{scratch\}\}", text, re.S)[1]
    theirs, target = tmp_path / "kairos-train-9-1-0.abcdef", tmp_path / "target"
    target.mkdir()
    for name in ("kairos-train-9-0-0.abcdef", "kairos-train-9-0-0.ghijkl", "kairos-train-9-0-1.abcdef"):
        (tmp_path / name / "kairos_train").mkdir(parents=True)
    theirs.mkdir()
    (tmp_path / "kairos-train-9-0-0.symlnk").symlink_to(target)
    environment = os.environ | {"SLURM_JOB_ID": "9", "SLURM_NODEID": "0"}
    subprocess.run(["bash", "-c", find, str(tmp_path), "0"], env=environment, check=True)
    left = ["kairos-train-9-0-0.symlnk", "kairos-train-9-0-1.abcdef", "kairos-train-9-1-0.abcdef", "target"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
