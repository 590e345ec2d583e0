"""The shard folder: WebDataset tar files of training windows and the index that describes them.

    DIR/index.json           what the shards hold and were made with, the number, size and sha256 of each
    DIR/consistency.json     what two sources within the dataset said differently (see `dataloaders.consistency.report`)
    DIR/dataset_stats.json   statistics of states and actions (see `dataloaders.packing.statistics`)
    DIR/shard-000000.tar …   members KEY.mp4, KEY.action.npy, KEY.state.npy, KEY.json and, when encoded,
                             KEY.latents.npy, KEY.context.npy
    DIR/empty_context.npy    optional: context of the empty prompt, float16 (N, C)

The same content always gives the same bytes: members are sorted, owners, modes and times are constants.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dataloaders.config import ClipConfig, LimitsConfig, WindowConfig
from dataloaders.files.npy import read_npy
from dataloaders.files.tar_samples import tar_samples
from dataloaders.files.urls import is_url, join, open_url, read_url, size_of
from kairos_train.basics.errors import UserError
from kairos_train.basics.foreign_files import (
    finite,
    holds_lfs_pointer,
    is_lfs_pointer,
    one_plain_line,
    parse_json,
    pointer_fault,
    shown,
    whole,
)
from kairos_train.basics.plain import from_dict
from kairos_train.basics.secrets import redacted

FORMAT = "kairos-shards-1"
INDEX, STATISTICS, EMPTY_CONTEXT = "index.json", "dataset_stats.json", "empty_context.npy"
MOST_BYTES = 32_000_000
"""Of each file beside the shards."""
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-]+\.tar")
_LONGEST_REASON, _LONGEST_MEMBER = 400, 100  # characters; the second as tars have it
MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_]+)+")


class CorruptData(Exception):
    """A shard or sample that cannot be used. `name` says which, `reason` why; the loader's policy decides the rest.

    `samples` is how many are lost with it. Neither text holds secrets of URLs.
    """

    def __init__(self, name: str, reason: str, *, samples: int = 1):
        name, reason = redacted(name), one_plain_line(redacted(reason), _LONGEST_REASON)
        super().__init__(f"{name}: {reason}")
        self.name, self.reason, self.samples = name, reason, samples


@dataclass(frozen=True)
class ShardInfo:
    name: str
    samples: int
    bytes: int
    sha256: str
    shapes: list[list[int]] | None = None  # runs of rows: [frames, height, width, rows]; None: the index's one shape


@dataclass(frozen=True)
class ShardIndex:
    """index.json. `fps` is that of raw frames and actions; clips play `action_video_freq_ratio` times slower.

    Of later versions, empty in older folders: `clips`, set for samples without a robot whose sizes differ; `shapes`,
    how many `samples` there are of each `frames`, `height`, `width`; the names of caption variants and quality scores;
    the hash of the statistics that belong to it; hashes of all that it was packed from, and of its files' sizes.
    """

    folder: Path | str  # str: a URL
    samples: int
    window: WindowConfig
    prompt_template: str
    action_dim: int
    state_dim: int
    fps: float
    encoders: dict[str, Any] | None
    tasks: list[str]
    source: dict[str, Any]
    shards: tuple[ShardInfo, ...]
    clips: ClipConfig | None = None
    shapes: list[dict[str, int]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    statistics_sha256: str | None = None
    recipe: str | None = None
    files_sha256: str | None = None

    @property
    def fingerprint(self) -> str:
        """Identity of the data: changes when any shard's content, order or name does."""
        return hashlib.sha256("\n".join(f"{s.name} {s.sha256}" for s in self.shards).encode()).hexdigest()[:16]

    @property
    def place(self) -> str:
        """The folder as messages and lists show it: without the secrets of a URL."""
        return redacted(str(self.folder))

    @property
    def cameras(self) -> tuple[str, ...]:
        """Of the pictures of windows, in their order; empty for clips, and where an earlier version told none."""
        return () if self.clips is not None else tuple(self.source.get("cameras") or self.window.cameras)

    def to_dict(self) -> dict[str, Any]:
        """The content of index.json."""
        values = {k: v for k, v in self.__dict__.items() if k != "folder"}
        return values | {
            "format": FORMAT,
            "window": asdict(self.window),
            "clips": None if self.clips is None else asdict(self.clips),
            "shards": [asdict(shard) for shard in self.shards],
        }

    def statistics(self) -> dict[str, Any]:
        """The content of dataset_stats.json. UserError when it is missing, not JSON, or not this index's."""
        path = join(self.folder, STATISTICS)
        content = _read(path)
        if self.statistics_sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise UserError(
                f"{path}: is not the file that these shards were packed with (the statistics of another dataset?); "
                f"restore it, or where it is meant remove statistics_sha256 from {INDEX}"
            )
        return _parsed(path, content)

    def empty_context(self) -> np.ndarray | None:
        """Context of the empty prompt, float32 (N, C); None when the shards were packed without one."""
        path = join(self.folder, EMPTY_CONTEXT)
        try:
            data = read_url(path, most_bytes=MOST_BYTES)
            if is_lfs_pointer(data):
                raise UserError(pointer_fault(path))
            return read_npy(data).astype(np.float32)
        except FileNotFoundError:
            return None
        except UserError:
            raise
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); pack again") from error


def read_index(folder: Path | str) -> ShardIndex:
    """Read and check DIR/index.json; DIR may be a URL.

    Raises:
        UserError: no shard folder, another format, missing or wrong entries, or names that are not plain file names.
    """
    folder = str(folder) if is_url(folder) else Path(folder)
    path = join(folder, INDEX)
    values = _parsed(path, _read(path))
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise UserError(f"{path}: format {found!r} is not {FORMAT!r}; pack with this version of kairos-train")
    try:
        shards = tuple(ShardInfo(**shard) for shard in values["shards"])
        window = from_dict(WindowConfig, values["window"])
        clips = from_dict(ClipConfig, values["clips"]) if values.get("clips") else None
        given = {k: v for k, v in values.items() if k not in ("format", "shards", "window", "clips")}
        index = ShardIndex(folder=folder, shards=shards, window=window, clips=clips, **given)
        _check_counts(index)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: incomplete or unknown entry ({error}); pack the dataset again") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path}: {error}; pack the dataset again") from error
    names = [shard.name for shard in index.shards]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: names shard {twice} twice; pack the dataset again")
    for shard in index.shards:
        if not _SHARD_NAME.fullmatch(shard.name):  # names come from a file: they must not lead out of the folder
            raise UserError(f"{path}: shard name {shard.name!r} is not a plain file name ending in .tar")
    if not index.shards or index.samples != sum(shard.samples for shard in index.shards):
        raise UserError(f"{path}: samples={index.samples} is not the sum over its shards; pack again")
    return index


def _check_counts(index: ShardIndex) -> None:
    """Raise ValueError unless all that is counted by, and that memory is reserved for, is a number that can be."""
    limits = LimitsConfig()
    for name in ("action_dim", "state_dim"):
        whole(getattr(index, name), name)
    if finite(index.fps, "fps") <= 0:
        raise ValueError(f"fps is {index.fps}")
    for shard in index.shards:
        if not isinstance(shard.name, str):
            raise ValueError(f"a shard is called {shown(shard.name)}")
        for name in ("samples", "bytes"):
            if not isinstance(count := getattr(shard, name), int) or count < 0:
                raise ValueError(f"shard {shard.name} with {name}={shown(count)}")
    shapes = [[shape[name] for name in ("frames", "height", "width")] for shape in index.shapes]
    for frames, height, width in [*shapes, *(run[:3] for shard in index.shards for run in shard.shapes or ())]:
        sizes = [whole(value, "a shape's size") for value in (frames, height, width)]
        if not 0 < sizes[0] <= limits.frames or not 0 < sizes[1] * sizes[2] <= limits.video_pixels:
            raise ValueError(f"samples of {frames} frames of {height}x{width} are none that are packed")


def sample_block(key: str, members: dict[str, bytes]) -> bytes:
    """The tar entries of one sample, to be stringed together by `write_shard`. `members`: extension -> content.

    Raises:
        UserError: a name that shards cannot hold.
    """
    out = []
    for extension in sorted(members):
        name, data = f"{key}.{extension}", members[extension]
        if len(name) > _LONGEST_MEMBER or not MEMBER_NAME.fullmatch(name):
            raise UserError(f"{shown(name)}: is no plain name of up to {_LONGEST_MEMBER} characters for a tar's member")
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        out += [info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)]
    return b"".join(out)


def write_shard(path: Path, blocks: Iterable[bytes]) -> ShardInfo:
    """Write one tar file from the blocks of its samples; returns its index entry."""
    digest, size, samples = hashlib.sha256(), 0, 0
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size, samples = size + len(block), samples + 1
        end = bytes(2 * tarfile.BLOCKSIZE)  # a tar ends with two zero blocks, filled up to a whole record
        end += bytes(-(size + len(end)) % tarfile.RECORDSIZE)
        file.write(end)
        digest.update(end)
    return ShardInfo(path.name, samples, size + len(end), digest.hexdigest())


def check_size(folder: Path | str, shard: ShardInfo) -> None:
    """The cheap check of a shard: hashing all of them at every epoch would double the reading.

    Raises:
        CorruptData: it is missing or has not the indexed size.
    """
    path = join(folder, shard.name)
    try:
        size = size_of(path)
    except FileNotFoundError as error:
        raise CorruptData(shard.name, "is missing", samples=shard.samples) from error
    except OSError as error:
        raise CorruptData(shard.name, f"cannot be read ({error})", samples=shard.samples) from error
    if size != shard.bytes:
        reason = f"has {size} bytes, the index says {shard.bytes}: truncated or replaced"
        if not is_url(path) and holds_lfs_pointer(path):
            reason = pointer_fault(path).removeprefix(f"{path}: ")
        raise CorruptData(shard.name, reason, samples=shard.samples)


def read_shard(folder: Path | str, shard: ShardInfo) -> Iterator[dict[str, Any]]:
    """Raw samples of one shard in order: `{"__key__": …, "mp4": bytes, "action.npy": bytes, …}`.

    A shard that is missing or has not the indexed size gives nothing; one with damage inside gives the samples before
    the damage. Either way what is lost depends on the bytes alone, never on timing.

    Raises:
        CorruptData: naming the shard; always after the samples that could be read.
    """
    seen = 0
    check_size(folder, shard)
    for key, members in tar_samples(join(folder, shard.name), unfinished=True):
        if isinstance(members, dict):
            strange = [name for name in members if not MEMBER_NAME.fullmatch(f"{key}.{name}")]
            members = f"member name {strange[0]!r} is not plain" if strange else members
        if isinstance(members, str):
            raise CorruptData(shard.name, f"cannot be read after {seen} samples ({key}: {members})")
        seen += 1
        yield {"__key__": key, **members}
    if seen != shard.samples:
        raise CorruptData(shard.name, f"holds {seen} samples, the index says {shard.samples}")


def verify(folder: Path | str) -> list[tuple[str, str]]:
    """Read every byte of every shard and compare with the index; (name, reason) of each that does not hold."""
    index, bad = read_index(folder), []
    for shard in index.shards:
        try:
            with open_url(join(index.folder, shard.name)) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            bad.append((shard.name, "is missing"))
            continue
        if found != shard.sha256:
            bad.append((shard.name, f"sha256 is {found[:16]}…, the index says {shard.sha256[:16]}…"))
    return bad


def _read(path: Path | str) -> bytes:
    try:
        data = read_url(path, most_bytes=MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; data.shards must be a folder written by `data pack`") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); is it a folder written by `data pack`?") from error
    if is_lfs_pointer(data):
        raise UserError(pointer_fault(path))
    return data


def _parsed(path: Path | str, content: bytes) -> Any:
    try:
        return parse_json(content, most_bytes=MOST_BYTES)
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); pack the dataset again") from error
