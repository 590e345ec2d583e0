"""YAML of strangers as text, once it is known that reading it stays small.

A few lines can stand for gigabytes (aliases of aliases), and a line of brackets for a stack without end. So the
parser's events are counted before anything is built of them, an alias as all that it stands for.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from kairos_train.basics.errors import UserError, one_line

MAX_BYTES = 4 * 2**20
MAX_DEPTH = 32  # of lists and mappings within each other
MAX_VALUES = 100_000  # with every alias written out

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def yaml_text(path: str | Path) -> str:
    """The text of a YAML file.

    Raises:
        UserError: it cannot be opened, is no UTF-8 or no YAML, or is past a limit of this module.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{path}: is longer than {MAX_BYTES >> 20} MiB; no configuration is")
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); give a text file in UTF-8") from error
    check_yaml(text, path)
    return text


def check_yaml(text: str, name: object) -> None:
    """Raise UserError for what is no YAML or past a limit of this module.

    Args:
        name: for messages.
    """
    try:
        _count(text, name)
    except yaml.YAMLError as error:
        raise UserError(f"{name}: is no YAML ({one_line(error)}); fix it, or restore the file") from error


def _count(text: str, name: object) -> None:
    values: dict[str, int] = {}  # of each anchor that is complete
    counts, anchors = [0], [None]  # of what is open, the document first
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            counts.append(1)
            anchors.append(event.anchor)
            if len(counts) > MAX_DEPTH + 1:
                raise UserError(f"{name}: is nested more than {MAX_DEPTH} deep; no setting is")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            found, anchor = counts.pop(), anchors.pop()
        elif isinstance(event, yaml.ScalarEvent):
            found, anchor = 1, event.anchor
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in values:
                raise UserError(f"{name}: *{event.anchor} stands before its anchor or within it; write the value out")
            found, anchor = values[event.anchor], None
        else:
            continue
        if anchor is not None:
            values[anchor] = found
        counts[-1] += found
        if counts[-1] > MAX_VALUES:
            raise UserError(
                f"{name}: holds more than {MAX_VALUES:,} values, its aliases written out; no run has as many"
            )
