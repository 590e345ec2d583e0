"""Text without the secrets that addresses carry: user names and passwords, and the queries of signed URLs.

Errors, logs and all that a run writes go through `redacted`, so that nobody has to remember it where a message is made.
"""

from __future__ import annotations

import re
from typing import Any

_LOGIN = re.compile(r"""(\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2})[^\s/?#"<>]*@""")
_QUERY = re.compile(
    r"""(\b[A-Za-z][A-Za-z0-9+.-]*:/{1,2}[^\s?#"<>]*)[?#][^\s"<>]*?([)\]}'.,:;!]*)(?=[\s"<>]|$)"""
)  # the second group: what closes the sentence around it


def redacted(text: str) -> str:
    """`text` with every URL in it cut down to scheme, host and path."""
    return _QUERY.sub(r"\1\2", _LOGIN.sub(r"\1", text))


def redacted_values(value: Any) -> Any:
    """Lists and mappings of plain values, with every text in them `redacted`."""
    if isinstance(value, dict):
        return {key: redacted_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_values(item) for item in value]
    return redacted(value) if isinstance(value, str) else value
