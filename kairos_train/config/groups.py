"""The groups of `configs/`, their options, and what each is: what `--help` lists, without reading any YAML."""

from __future__ import annotations

import importlib.resources
import textwrap
from collections.abc import Sequence
from pathlib import Path

SHIPPED = Path(str(importlib.resources.files("configs")))


def groups_of(roots: Sequence[Path] = (SHIPPED,)) -> dict[str, list[str]]:
    """Group -> its options, over all folders."""
    groups: dict[str, set[str]] = {}
    for root in roots:
        for file in root.rglob("*.yaml"):
            group, *option = file.relative_to(root).with_suffix("").parts
            if option:
                groups.setdefault(group, set()).add("/".join(option))
    return {group: sorted(options) for group, options in sorted(groups.items())}


def about(group: str, option: str) -> str:
    """The first sentence of the comment at the top of an option's file."""
    lines = (SHIPPED / group / f"{option}.yaml").read_text(encoding="utf-8").splitlines()
    said = []
    for line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            said.append(line.removeprefix("#").strip())
    return " ".join(said).split(". ")[0].rstrip(".:")


def listing(columns: int) -> str:
    """Experiments with what they are, and the other groups with their options."""
    groups = groups_of()
    experiments = groups.pop("experiment")
    width = max(map(len, [*experiments, *groups])) + 4

    def entry(name: str, text: str) -> str:
        indents = {"initial_indent": f"  {name}".ljust(width), "subsequent_indent": " " * width}
        return textwrap.fill(text, max(columns, 2 * width), break_on_hyphens=False, **indents)

    lines = ["experiments (experiment=NAME):", *(entry(name, about("experiment", name)) for name in experiments)]
    lines += ["", "groups (GROUP=NAME):", *(entry(group, ", ".join(options)) for group, options in groups.items())]
    return "\n".join([*lines, "", "settings (KEY=VALUE): `kairos-train config --show SECTION`, and docs/settings.md"])
