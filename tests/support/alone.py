"""Code for an interpreter in which only a few distributions, and what they need, are installed."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable

OURS = {"kairos_train", "parallel", "dataloaders", "evaluation", "configs"}

ALONE = """
import sys

class Alone:
    "Every package but the allowed ones is not installed."
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            refused.add(name.partition(".")[0])
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

allowed, refused = {distributions}, set()
for name in [name for name in sys.modules if name.partition(".")[0] not in allowed | {{"__main__"}}]:
    del sys.modules[name]
sys.meta_path.insert(0, Alone())
"""
"""To be formatted with the result of `installed_with`. `refused` holds what was asked for in vain."""


def installed_with(names: Iterable[str]) -> set[str]:
    """The packages that can be imported where these distributions, and all that they need, are installed."""
    distributions: set[str] = set()
    for name in names:
        _needed(_plain(name), distributions)
    provided = importlib.metadata.packages_distributions()
    found = {package for package, by in provided.items() if distributions & set(map(_plain, by))}
    return found | set(sys.stdlib_module_names) | OURS


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _needed(name: str, seen: set[str]) -> None:
    """Add the distributions that `name` cannot be installed without, itself included; such as are not here are none."""
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return
    seen.add(name)
    for line in requires:
        other = _plain(re.match(r"[\w.-]+", line)[0])
        if "extra ==" not in line and other not in seen:
            _needed(other, seen)
