"""Imports point down only. Held by reading every import statement, at the top of a file and inside functions."""

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from kairos_train.training.engine import deepspeed_internals
from parallel.internals import MEGATRON

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kairos_train", "parallel", "dataloaders", "configs", "evaluation", "benchmarks")
MOST_MODULES = 20
"""In one folder, without `__init__.py`."""
MOST_LINES = 400
MOST_WITH_THE_WHOLE_CONFIG = 6
"""Modules of `kairos_train.training` that know `Config`; the others are given the sections that they read."""

FLOORS: tuple[tuple[str, ...], ...] = (
    ("kairos_train.basics",),
    ("parallel.config", "dataloaders.config"),
    ("configs", "kairos_train.config", "parallel", "dataloaders"),
    ("kairos_train.model", "kairos_train.conditioning", "kairos_train.launch"),
    ("kairos_train.objective", "kairos_train.plan", "kairos_train.checkpoint"),
    ("kairos_train.inference", "kairos_train.operations"),
    ("kairos_train.weights", "kairos_train.serving", "kairos_train.training"),
    ("evaluation",),
    ("kairos_train.api",),
    ("kairos_train.commands", "kairos_train.demos"),
    ("kairos_train.cli", "benchmarks"),
)
"""From the ground up. A module imports its own room and floors below it, not its neighbours. The longest name that fits
decides which room a module is in. `kairos_train/__init__.py` is in none: it is what users import, see FACADE."""

FACADE, BEHIND_IT = "kairos_train", "kairos_train.api"
"""The package that users import knows one module, and none of ours takes its functions from there."""

NOT_BELOW: dict[str, tuple[str, ...]] = {
    "parallel": ("kairos_train.config",),  # knows no model and no run
    "dataloaders": ("kairos_train.config",),
    "kairos_train.model": ("dataloaders",),
    "kairos_train.conditioning": ("dataloaders", "parallel"),
    "kairos_train.launch": ("dataloaders", "parallel"),
    "kairos_train.objective": ("dataloaders", "parallel", "kairos_train.launch"),
    "kairos_train.checkpoint": ("dataloaders", "kairos_train.launch"),
    "kairos_train.inference": ("dataloaders", "parallel", "kairos_train.checkpoint", "kairos_train.plan"),
    "kairos_train.operations": ("dataloaders", "kairos_train.plan", "kairos_train.conditioning"),
    "kairos_train.weights": ("dataloaders", "kairos_train.operations", "kairos_train.plan"),
    "kairos_train.serving": ("kairos_train.operations", "kairos_train.checkpoint", "kairos_train.plan"),
    "kairos_train.training": ("kairos_train.plan", "kairos_train.launch"),
    "evaluation": (
        "kairos_train.training",
        "kairos_train.checkpoint",
        "kairos_train.weights",
        "kairos_train.operations",
    ),
}
"""Rooms on lower floors that a room does without all the same."""

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


def room_of(module: str) -> tuple[int, str]:
    """Floor and name of the room that a module is in."""
    rooms = [(len(room), floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms if within(module, room)]
    assert rooms, f"{module}: it is in no room; give it one in FLOORS"
    _, floor, room = max(rooms)
    return floor, room


def from_the_facade(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of what is taken from the package that users import and is no module: its functions and classes."""
    taken, bound = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name for alias in node.names if alias.name == FACADE}
        elif isinstance(node, ast.ImportFrom) and node.module == FACADE:
            taken += [(alias.name, node.lineno) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            taken.append((node.attr, node.lineno))
    for name, line in taken:
        if not name.startswith("__") and not is_module(f"{FACADE}.{name}"):
            yield f"{FACADE}.{name}", line


def faults(module: str, tree: ast.AST) -> list[str]:
    """The imports of this project's own modules that `module` may not make."""
    if module == FACADE:
        ours = [(name, line) for name, line in imported(tree) if name.split(".")[0] in ROOMS and name != FACADE]
        return [f"line {line}: {module} imports {name}" for name, line in ours if not within(name, BEHIND_IT)]
    found = [f"line {line}: {module} imports {name}" for name, line in from_the_facade(tree)]
    floor, room = room_of(module)
    for name, line in imported(tree):
        if name.split(".")[0] not in ROOMS or not is_module(name) or not any(within(name, r) for r in sum(FLOORS, ())):
            continue
        below, its_room = room_of(name)
        if its_room != room and (below >= floor or its_room in NOT_BELOW.get(room, ())):
            found.append(f"line {line}: {module} imports {name}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    assert faults(module_name(path), ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("kairos_train.basics.files", "from kairos_train.config import schema"),
        ("parallel.config", "from parallel import topology"),
        ("dataloaders.packing.pack", "import kairos_train.config.compose"),
        ("dataloaders.packing.pack", "from kairos_train.model import WorldActionModel"),
        ("dataloaders.shards", "from parallel import topology"),
        ("kairos_train.config.schema", "from kairos_train.model import WorldActionModel"),
        ("parallel.topology", "def f():\n    from kairos_train.model.kernels import attention"),
        ("parallel.topology", "if TYPE_CHECKING:\n    from kairos_train.config.schema import Config"),
        ("kairos_train.model.block", "from kairos_train.objective import schedule"),
        ("kairos_train.objective.schedule", "from kairos_train.checkpoint.canonical import CheckpointReader"),
        ("kairos_train.inference.load", "from dataloaders.loading.batch import Batch"),
        ("kairos_train.inference.load", "from kairos_train.weights import export"),
        ("kairos_train.weights.export", "import kairos_train.training.loop"),
        ("kairos_train.training.loop", "from kairos_train import cli"),
        ("evaluation.rollout", "from kairos_train.training import loop"),
        ("kairos_train.serving.policy", "from kairos_train.operations import events"),
        ("kairos_train.commands.data", "from kairos_train import load"),
        ("kairos_train.commands.data", "def f():\n    import kairos_train as kt\n    kt.load(1)"),
        ("kairos_train.api", "from kairos_train.commands import data"),
        ("kairos_train", "from kairos_train import inference"),
        ("kairos_train", "if TYPE_CHECKING:\n    from kairos_train.config.schema import Config"),
    ],
)
def test_an_import_that_points_up_is_found(module, statement):
    assert faults(module, ast.parse(statement))


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The groups of modules that know each other: strongly connected, larger than one."""
    reach = {module: {module} for module in graph}
    changed = True
    while changed:
        changed = False
        for module, known in graph.items():
            more = set().union(*(reach[name] for name in known)) - reach[module]
            reach[module] |= more
            changed |= bool(more)
    groups = [{other for other in reach[module] if module in reach[other]} for module in graph]
    return [group for i, group in enumerate(groups) if len(group) > 1 and group not in groups[:i]]


def knowledge(files: dict[str, str]) -> dict[str, set[str]]:
    """Module -> the modules of `files` that it imports, lazily and for type checking included."""
    graph = {}
    for module, text in files.items():
        names = [name for name, _ in imported(ast.parse(text)) if name in files]
        # `from a import b` reads the file a only where b is not a file of its own.
        packages = {n for n in names if any(other.startswith(n + ".") for other in names)}
        graph[module] = {*names} - packages - {module}
    return graph


def test_no_circle_of_files():
    assert circles(knowledge({module_name(path): path.read_text() for path in sources()})) == []


def test_a_lazy_circle_is_found():
    lazy = {"parallel.a": "from parallel.b import f", "parallel.b": "def f():\n    from parallel import a"}
    assert circles(knowledge({"parallel": "", **lazy})) == [{"parallel.a", "parallel.b"}]
    typing = {**lazy, "parallel.b": "if TYPE_CHECKING:\n    from parallel.a import A"}
    assert circles(knowledge(typing)) == [{"parallel.a", "parallel.b"}]
    assert circles(knowledge({**lazy, "parallel.b": ""})) == []


def crowded(folders: Iterable[str]) -> list[str]:
    """Of the folders that modules are in, one name per module, those with too many."""
    return [folder for folder, count in Counter(folders).items() if count > MOST_MODULES]


def test_no_folder_has_more_than_20_modules():
    assert crowded(str(p.parent.relative_to(ROOT)) for p in sources() if p.name != "__init__.py") == []
    assert crowded(["a"] * 20 + ["b"] * 21) == ["b"]


def test_no_file_is_longer_than_400_lines():
    assert [str(path) for path in sources() if len(path.read_text().splitlines()) > MOST_LINES] == []


def knows_the_whole_config(text: str) -> bool:
    """Whether a module imports `Config`, from the schema or from where it was imported to, or the schema as a whole."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and "kairos_train.config.schema" in [alias.name for alias in node.names]:
            return True
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kairos_train."):
            found = {(node.module, alias.name) for alias in node.names}
            if ("kairos_train.config", "schema") in found or {"Config", "*"} & {name for _, name in found}:
                return True
    return False


def too_many_know_the_whole_config(texts: Iterable[str]) -> bool:
    return sum(map(knows_the_whole_config, texts)) > MOST_WITH_THE_WHOLE_CONFIG


def test_few_training_modules_know_the_whole_config():
    training = [path.read_text() for path in sources() if within(module_name(path), "kairos_train.training")]
    assert not too_many_know_the_whole_config(training)
    for text in (
        "if TYPE_CHECKING:\n    from kairos_train.config.schema import Config",
        "def f():\n    from kairos_train.config.schema import Config as Everything",
        "from kairos_train.config.compose import Config, load_saved",
        "from kairos_train.config import schema",
        "import kairos_train.config.schema",
    ):
        assert not too_many_know_the_whole_config([text] * MOST_WITH_THE_WHOLE_CONFIG)
        assert too_many_know_the_whole_config([text] * (MOST_WITH_THE_WHOLE_CONFIG + 1)), text
    assert not knows_the_whole_config("from kairos_train.config.schema import StageConfig, TrainConfig")


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


INTERNALS = {
    "kairos_train/training/engine/deepspeed_internals.py": deepspeed_internals.INTERNALS,
    "parallel/megatron_linear.py": MEGATRON,
}
"""File -> the undocumented names of other packages that it alone uses."""

OWNERS = {i.name: file for file, internals in INTERNALS.items() for i in internals if not i.shared}


def undocumented(file: str, tree: ast.AST) -> list[str]:
    """Names that another file wraps: as an attribute, imported, or spelled out for `getattr` and the like."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.alias):
            names = [node.name]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            names = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        found += [f"line {node.lineno}: {name}, see {OWNERS[name]}" for name in names if OWNERS.get(name, file) != file]
    return found


IMITATION = ROOT / "tests/unit/training/test_master_shards.py"
"""Builds what DeepSpeed leaves on a rank, to read it without processes; four real pairs are in tests/distributed."""


def test_undocumented_names_of_other_packages_are_used_in_one_file():
    for path in {*sources(), *(ROOT / "tests").rglob("*.py")} - {IMITATION}:
        assert undocumented(str(path.relative_to(ROOT)), ast.parse(path.read_text())) == [], path


@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("flats = engine.optimizer.fp32_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
        ("shape = getattr(parameter, 'ds_shape', parameter.shape)", "ds_shape"),
        ("parameter._hp_mapping = None", "_hp_mapping"),
        ("from deepspeed.comm.comm import cdb", "cdb"),
        ("y = layer._forward_impl(input=x)", "_forward_impl"),
    ],
)
def test_an_undocumented_name_in_another_file_is_found(statement, name):
    assert undocumented("parallel/mpu.py", ast.parse(statement)) == [f"line 1: {name}, see {OWNERS[name]}"]
    assert undocumented(OWNERS[name], ast.parse(statement)) == []


NOT_LOADED = {  # module -> what importing it must not load; in the order of import, what loads least first
    "kairos_train": ("torch", "hydra", "numpy"),
    "kairos_train.api": ("torch", "hydra", "numpy"),
    "kairos_train.cli": ("torch", "hydra", "numpy"),
    "kairos_train.serving.client": ("torch", "prometheus_client", "PIL"),
    "kairos_train.inference.load": (
        *("hydra", "omegaconf", "deepspeed", "diffusers", "transformers", "av", "pyarrow"),
    ),
    "kairos_train.conditioning.build": ("transformers", "diffusers", "PIL", "av"),
    "kairos_train.conditioning.block_dct": ("transformers", "diffusers", "PIL", "av"),
    "kairos_train.conditioning.hashed_ngrams": ("transformers", "diffusers", "PIL", "av"),
    "kairos_train.serving.server": ("hydra", "deepspeed", "diffusers", "transformers", "av", "pyarrow"),
    "dataloaders.loading.loader": ("hydra", "deepspeed", "metaworld", "mujoco"),
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
