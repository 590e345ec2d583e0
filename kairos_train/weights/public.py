"""Names of the public checkpoint layout (model specification, "Checkpoint keys").

The project's own parameter names are the public ones with a stream prefix: `video_dit.…` and `action_dit.…`. A public
file may carry one more prefix in front (`pipe.dit.` or `dit.`), and a video-only file no stream prefix at all.
"""

from collections.abc import Iterable

from kairos_train.basics.errors import UserError

STREAMS = ("video_dit.", "action_dit.")
WRAPPERS = ("pipe.dit.", "dit.")


def from_public(names: Iterable[str]) -> dict[str, str]:
    """Map the keys of a public file to this project's parameter names.

    Args:
        names: every key of the file.

    Returns:
        {key in the file: parameter name}.

    Raises:
        UserError: no keys, keys that follow more than one layout, or two keys that name one parameter.
    """
    names = list(names)
    if not names:
        raise UserError("checkpoint keys: the file holds no tensor; give a file of model weights")
    wrapper = _one_for_all(names, WRAPPERS)
    bare = {name: name.removeprefix(wrapper) for name in names}
    with_stream = [name for name in names if bare[name].startswith(STREAMS)]
    if with_stream and len(with_stream) != len(names):
        odd = next(name for name in names if not bare[name].startswith(STREAMS))
        raise UserError(
            f"checkpoint key {odd!r}: has no stream prefix ({' or '.join(STREAMS)}) while {with_stream[0]!r} has one;"
            " one file follows one layout"
        )
    return bare if with_stream else {name: STREAMS[0] + rest for name, rest in bare.items()}


def to_public(names: Iterable[str], *, wrapper: str = "", stream_prefix: bool = True) -> dict[str, str]:
    """Map parameter names to the keys of a public file.

    Args:
        names: parameter names, all with a stream prefix.
        wrapper: "", "dit." or "pipe.dit.", put in front of each.
        stream_prefix: False for the video-only layout, which has none.

    Returns:
        {parameter name: key in the file}.

    Raises:
        UserError: a name without a stream prefix, action weights in a video-only layout, an unknown wrapper.
    """
    if wrapper not in ("", *WRAPPERS):
        raise UserError(f"wrapper={wrapper!r}: must be empty or one of {', '.join(WRAPPERS)}")
    mapped = {}
    for name in names:
        if not name.startswith(STREAMS):
            raise UserError(f"parameter {name!r}: has no stream prefix ({' or '.join(STREAMS)})")
        if not stream_prefix and not name.startswith(STREAMS[0]):
            raise UserError(f"parameter {name!r}: the video-only layout holds {STREAMS[0]}… alone; keep prefixes")
        mapped[name] = wrapper + (name if stream_prefix else name.removeprefix(STREAMS[0]))
    return mapped


def _one_for_all(names: list[str], prefixes: tuple[str, ...]) -> str:
    """The prefix all names share, "" when none has any."""
    found = {name: next((p for p in prefixes if name.startswith(p)), "") for name in names}
    if len(set(found.values())) > 1:
        first, a = names[0], found[names[0]]
        second, b = next((name, prefix) for name, prefix in found.items() if prefix != a)
        raise UserError(
            f"checkpoint keys {first!r} and {second!r}: one carries the prefix {a!r}, the other {b!r};"
            " one file follows one layout"
        )
    return found[names[0]]
