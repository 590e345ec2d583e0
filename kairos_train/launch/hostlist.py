"""Slurm's short form of many host names, as in `gpu[01-03,7]-ib,login`, written out."""

from __future__ import annotations

import itertools
import re

from kairos_train.basics.errors import UserError

_HOST = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")  # up to a comma outside of brackets
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


def expand(hosts: str) -> list[str]:
    """Every host's name, in the order of the list. Zeros in front stay.

    Raises:
        UserError: brackets that do not match, or something else than numbers and spans in them.
    """
    names: list[str] = []
    rest = hosts
    while rest:
        match = _HOST.match(rest)
        if match is None or (match.end() < len(rest) and rest[match.end()] != ","):
            raise UserError(f"host list {hosts!r} cannot be read at {rest!r}; give it as Slurm writes it")
        names += _expand_one(match[0], hosts)
        rest = rest[match.end() + 1 :]
    return names


def _expand_one(host: str, hosts: str) -> list[str]:
    parts = []
    for i, part in enumerate(re.split(r"\[([^\[\]]*)\]", host)):
        parts.append(_numbers(part, hosts) if i % 2 else [part])
    return ["".join(words) for words in itertools.product(*parts)]


def _numbers(spans: str, hosts: str) -> list[str]:
    numbers = []
    for span in spans.split(","):
        match = _SPAN.fullmatch(span)
        first, last = (match[1], match[2] or match[1]) if match else ("", "")
        if not match or int(first) > int(last):
            raise UserError(f"host list {hosts!r}: [{spans}] holds {span!r}, which is no number and no span of numbers")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    return numbers
