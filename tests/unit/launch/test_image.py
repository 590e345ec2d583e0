"""The image's packages: named once with a version, held to their hashes, and the same as everywhere else."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LOCKS = [ROOT / "slurm" / name for name in ("image.lock", "image_build.lock")]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Package → version."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", path.read_text(), re.M)
    assert len({canonical(name) for name, _ in found}) == len(found), "each once"
    return {canonical(name): version for name, version in found}


def names(requirements: list[str]) -> set[str]:
    return {canonical(re.match(r"[\w.-]+", text)[0]) for text in requirements}


CONSTRAINTS = pins(ROOT / "constraints.txt")


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_package_of_the_image_is_held_to_its_hash(lock):
    entries = re.split(r"^(?=[A-Za-z])", re.sub(r"^\s*#.*\n", "", lock.read_text(), flags=re.M), flags=re.M)[1:]
    assert len(entries) == len(pins(lock))
    for entry in entries:
        assert re.fullmatch(r"[\w.-]+==\S+( ; [^\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", entry), entry


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_the_image_has_the_versions_that_are_installed_elsewhere(lock):
    unlike = {name: version for name, version in pins(lock).items() if CONSTRAINTS.get(name, version) != version}
    assert unlike == {}
    assert pins(LOCKS[1]).items() <= pins(LOCKS[0]).items() | {
        item for item in pins(LOCKS[1]).items() if item[0] in ("wheel", "cmake", "pybind11")
    }, "what is there while the image is built stays"


def test_the_image_has_what_the_project_and_its_extras_need():
    assert {"cuda", "fp8", "s3"} <= set(EXTRAS)
    wanted = names(PROJECT["dependencies"]).union(*(names(EXTRAS[extra]) for extra in set(EXTRAS) - {"dev"}))
    wanted -= {"kairos-train"}  # an extra that takes another
    for pinned in (CONSTRAINTS, pins(LOCKS[0])):
        assert wanted | {"flash-attn", "fla-core"} <= pinned.keys()


def test_nothing_gets_into_the_image_past_the_hashes():
    text = re.sub(r"\\\n", " ", (ROOT / "slurm/Dockerfile").read_text())
    installs = re.findall(r"^RUN .*pip install (.*)$", text, re.M)
    assert len(installs) == 3
    assert all("--require-hashes" in words or "--no-index" in words for words in installs)
    assert {"FLASH_ATTENTION_FORCE_BUILD=TRUE", "NVTE_PYTORCH_FORCE_BUILD=TRUE"} <= set(text.split())


def test_deepspeed_is_one_release():
    """Its insides are used."""
    assert f"deepspeed=={CONSTRAINTS['deepspeed']}" in EXTRAS["train"]
