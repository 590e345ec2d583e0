"""The names of DeepSpeed and Megatron-core beyond their documentation, looked up in what is installed."""

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from kairos_train.training.engine import deepspeed_internals
from parallel.internals import MEGATRON, Internal

CONTRACTS = {
    ("deepspeed", "deepspeed"): deepspeed_internals.INTERNALS,
    ("megatron", "megatron-core"): MEGATRON,
}
"""(package, its distribution) -> the names."""

CASES = [
    pytest.param(*source, internal, id=f"{internal.owner or internal.file}.{internal.name}")
    for source, internals in CONTRACTS.items()
    for internal in internals
]


@cache
def source_of(package: str, file: str) -> ast.Module:
    """A module of an installed package, read and not imported: the package starts in seconds, and loads torch."""
    root = Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
    path = root / file
    assert path.is_file(), f"{package} has no file {file} any more"
    return ast.parse(path.read_text())


def definitions(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """(name, node) of everything that is defined, imported or assigned in a piece of source, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield (node.id if isinstance(node, ast.Name) else node.attr), node
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):  # globals()["name"] = ...
            if isinstance(node.slice, ast.Constant):
                yield node.slice.value, node
        elif isinstance(node, ast.alias):
            yield node.asname or node.name, node
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):  # NAME = "name"
            yield node.value.value, node


def members(node: ast.AST) -> set[str]:
    """Arguments of a function, fields of a class."""
    if isinstance(node, ast.FunctionDef):
        return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)}
    return {name for name, _ in definitions(node)}


def fault(tree: ast.Module, internal: Internal) -> str | None:
    """What a module lacks of a name."""
    scope: ast.AST = tree
    if internal.owner is not None:
        scope = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == internal.owner), None)
        if scope is None:
            return f"there is no class {internal.owner} in {internal.file}"
    found = [node for name, node in definitions(scope) if name == internal.name]
    if not found:
        return f"{internal.owner or internal.file} defines no {internal.name}"
    if internal.members and not any(set(internal.members) <= members(node) for node in found):
        return f"{internal.name} in {internal.file} lacks one of {', '.join(internal.members)}"
    return None


@pytest.mark.parametrize(("package", "distribution", "internal"), CASES)
def test_a_name_beyond_the_documentation_is_there(package, distribution, internal):
    installed = version(distribution)
    missing = fault(source_of(package, internal.file), internal)
    assert missing is None, f"{distribution} {installed}: {missing}; needed for: {internal.why}"
    first, now, last = (
        list(map(int, v.split(".")[:3])) for v in (internal.versions[0], installed, internal.versions[1])
    )
    assert first <= now <= last, (
        f"{distribution} {installed}: read the definition of {internal.name} in {internal.file} again, then set its "
        f"versions; needed for: {internal.why}"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class A:\n    def f(self, x, y): pass", None),
        ("class A:\n    def __init__(self):\n        self.f = lambda x: x", "f in a.py lacks one of x"),
        ("class A:\n    def f(self, z): pass", "f in a.py lacks one of x"),
        ("class A:\n    def g(self, x): return self.f(x)", "A defines no f"),
        ("class B:\n    def f(self, x): pass", "there is no class A in a.py"),
    ],
)
def test_a_name_that_moved_is_found(source, expected):
    internal = Internal("f", "a.py", "A", "", ("1", "2"), members=("x",))
    assert fault(ast.parse(source), internal) == expected


def test_deepspeed_counts_parameters_of_tensor_ranks_by_an_attribute_of_ours():
    """`parallel.sharding.set_attributes` sets it; gradient norms would be wrong without it."""
    tree = source_of("deepspeed", "runtime/utils.py")
    counted = next(n for n in tree.body if getattr(n, "name", None) == "is_model_parallel_parameter")
    assert "p.tensor_model_parallel" in ast.unparse(counted)
