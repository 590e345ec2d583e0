"""Imports point down only. Held by reading every import statement, at the top of a file and inside functions."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kairos_train", "parallel", "dataloaders", "configs", "evaluation", "benchmarks")

SCHEMA = ("kairos_train.errors", "kairos_train.config.schema", "kairos_train.config.operation_schema")
ALLOWED: dict[str, tuple[str, ...]] = {
    "kairos_train.errors": (),
    "kairos_train.config": ("kairos_train.config", "kairos_train.errors"),
    "configs": (),
    "dataloaders": ("dataloaders", *SCHEMA),
    "parallel": ("parallel", *SCHEMA),
    "kairos_train.model": ("kairos_train.model", "parallel", *SCHEMA),
    "kairos_train.plan": ("kairos_train.plan", "kairos_train.model", "parallel", *SCHEMA),
    "kairos_train.objective": ("kairos_train.objective", "kairos_train.model", *SCHEMA),
    "kairos_train.conditioning": ("kairos_train.conditioning", *SCHEMA),
    "kairos_train.inference": (
        *("kairos_train.inference", "kairos_train.model", "kairos_train.objective", "kairos_train.conditioning"),
        *SCHEMA,
    ),
    "kairos_train.serving": (
        *("kairos_train.serving", "kairos_train.inference", "kairos_train.conditioning", "dataloaders.windows"),
        *SCHEMA,
    ),
    "kairos_train.checkpoint": (
        *("kairos_train.checkpoint", "kairos_train.model", "kairos_train.objective", "kairos_train.config"),
        *("kairos_train.inference", "kairos_train.conditioning", "parallel", "kairos_train.errors"),
    ),
    "kairos_train.operations": (
        *("kairos_train.operations", "kairos_train.checkpoint", "kairos_train.config", "kairos_train.errors"),
        "parallel",
    ),
    "kairos_train.training": (
        *("kairos_train.training", "kairos_train.checkpoint", "kairos_train.inference", "kairos_train.conditioning"),
        *("kairos_train.objective", "kairos_train.model", "kairos_train.config", "kairos_train.errors"),
        *("kairos_train.operations", "parallel", "dataloaders"),
    ),
    "kairos_train.launch": ("kairos_train.launch", "kairos_train.config", "kairos_train.errors"),
    "evaluation": (
        *("evaluation", "kairos_train.inference", "kairos_train.conditioning", "kairos_train.objective"),
        *("kairos_train.model", "kairos_train.config", "kairos_train.errors", "dataloaders"),
        "kairos_train.serving.client",
    ),
    # On top of everything; what is not named here has no rule and is an error.
    "kairos_train.cli": ROOMS,
    "kairos_train.commands": ROOMS,
    "kairos_train.demos": ROOMS,
    "benchmarks": ROOMS,
}
"""Room -> the modules of this project that it may import. The longest name that fits decides."""

COMMAND_LINE = ("kairos_train.cli", "kairos_train.commands")
NEVER_AT_THE_TOP = ("deepspeed", "megatron", "fla", "flash_attn", "transformer_engine", "metaworld", "mujoco")
AT_THE_TOP_ANYWAY: dict[str, tuple[str, ...]] = {"parallel/megatron_linear.py": ("megatron",)}
"""File -> packages out of NEVER_AT_THE_TOP that it may import at its top, because it exists for them alone."""

INFERENCE_NEEDS = {"torch", "numpy", "safetensors"}


def sources() -> list[Path]:
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of every import statement; of `from a import b` both a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide where a file reaches"
            yield node.module, node.lineno
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)
        elif not (top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from imported(node, top_only=top_only)


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def allowed_for(module: str) -> tuple[str, ...]:
    rooms = [room for room in ALLOWED if within(module, room)]
    assert rooms, f"{module}: no rule in tests/unit/test_layers.py; say what it may import"
    return ALLOWED[max(rooms, key=len)]


def faults(module: str, tree: ast.AST) -> list[str]:
    """The imports of this project's own modules that `module` may not make."""
    found = []
    for name, line in imported(tree):
        if name.split(".")[0] not in ROOMS or not is_module(name) or name == "kairos_train":
            continue
        package = any(within(rule, name) for rule in allowed_for(module))  # `from kairos_train.config import schema`
        if not package and not any(within(name, rule) for rule in allowed_for(module)):
            found.append(f"line {line}: {module} imports {name}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    if path == ROOT / "kairos_train/__init__.py":
        assert not list(imported(ast.parse(path.read_text())))
        return
    assert faults(module_name(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("dataloaders.pack", "import kairos_train.config.compose"),
        ("dataloaders.pack", "from kairos_train.model import WorldActionModel"),
        ("kairos_train.config.schema", "from kairos_train.model import WorldActionModel"),
        ("parallel.topology", "def f():\n    from kairos_train.model import attention"),
        ("kairos_train.model.block", "from kairos_train.objective import schedule"),
        ("kairos_train.objective.schedule", "from kairos_train.checkpoint.canonical import CheckpointReader"),
        ("kairos_train.inference.load", "from dataloaders.batch import Batch"),
        ("kairos_train.inference.load", "from kairos_train.config.compose import load_saved"),
        ("kairos_train.checkpoint.export", "import kairos_train.training.loop"),
        ("kairos_train.training.loop", "from kairos_train import cli"),
        ("evaluation.rollout", "from kairos_train.training import loop"),
        ("kairos_train.serving.policy", "from dataloaders.batch import Batch"),
    ],
)
def test_an_import_that_points_up_is_found(module, statement):
    assert faults(module, ast.parse(statement))


def test_nothing_imports_the_command_line():
    for path in sources():
        names = {name for name, _ in imported(ast.parse(path.read_text()))}
        above = ["kairos_train.cli"] if within(module_name(path), "kairos_train.commands") else COMMAND_LINE
        if path != ROOT / "kairos_train/cli.py":
            assert not any(within(name, part) for name in names for part in above), path


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    file = str(path.relative_to(ROOT))
    top = {name.split(".")[0] for name, _ in imported(ast.parse(path.read_text()), top_only=True)}
    assert top & set(NEVER_AT_THE_TOP) <= set(AT_THE_TOP_ANYWAY.get(file, ()))


def test_inference_needs_torch_numpy_and_safetensors_only():
    for path in sorted((ROOT / "kairos_train/inference").rglob("*.py")):
        top = {name.split(".")[0] for name, _ in imported(ast.parse(path.read_text()), top_only=True)}
        assert top - set(sys.stdlib_module_names) - {"kairos_train"} <= INFERENCE_NEEDS, path


NOT_LOADED = {  # module -> what importing it must not load; in the order of import, what loads least first
    "kairos_train.cli": ("torch", "hydra", "numpy"),
    "kairos_train.serving.client": ("torch", "prometheus_client", "PIL"),
    "kairos_train.inference.load": (
        *("hydra", "omegaconf", "deepspeed", "diffusers", "transformers", "av", "pyarrow"),
    ),
    "kairos_train.conditioning.build": ("transformers", "diffusers", "PIL", "av"),
    "kairos_train.conditioning.block_dct": ("transformers", "diffusers", "PIL", "av"),
    "kairos_train.conditioning.hashed_ngrams": ("transformers", "diffusers", "PIL", "av"),
    "kairos_train.serving.server": ("hydra", "deepspeed", "diffusers", "transformers", "av", "pyarrow"),
    "dataloaders.loader": ("hydra", "deepspeed", "metaworld", "mujoco"),
    "kairos_train.training.loop": ("deepspeed", "metaworld", "mujoco", "diffusers", "transformers"),
}


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """Module -> what is loaded when it and those before it in NOT_LOADED have been imported, in a process of its own.

    One process for all: torch takes seconds to start. So a fault of one module may show at those behind it too.
    """
    code = (
        "import importlib, json, sys\n"
        f"found = {{m: importlib.import_module(m) and list(sys.modules) for m in {list(NOT_LOADED)}}}\n"
        "print(json.dumps(found))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(out.stdout)


@pytest.mark.parametrize("module", NOT_LOADED)
def test_importing_a_module_loads_none_of_what_it_may_not_need(module, loaded):
    assert set(NOT_LOADED[module]) & set(loaded[module]) == set()
