"""Parquet files of others, measured before they are decoded: a hundred kilobytes may stand for gigabytes.

How many numbers there are is in the file's footer. Texts that repeat are there once: they are read as numbers in a
dictionary, and decoded when their lengths are known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataloaders.config import LimitsConfig
from kairos_train.basics.errors import UserError, one_line
from kairos_train.basics.foreign_files import refuse_lfs_pointer

_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}  # bytes; at least
_INDEX = 4  # bytes of a text while it is a number in a dictionary
_TEXT = 2  # how often a text counts: it is in a dictionary, and out of it
_ROWS = 4096  # that are Python objects at a time


def read_table(path: Path, limits: LimitsConfig, *, columns: Sequence[str] | None = None) -> pa.Table:
    """A parquet file, or some of its columns; none of them is a dictionary.

    Raises:
        UserError: the file is missing, not readable, or larger in memory than `limits.table_mb`.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: the file is missing; the dataset is incomplete: fetch or write it again")
    refuse_lfs_pointer(path)
    try:
        return _read(path, limits, columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable parquet file ({one_line(error)[:200]}); restore it") from error


def column_names(path: Path) -> list[str]:
    """Column names of a parquet file.

    Raises:
        UserError: the file is missing or not readable.
    """
    refuse_lfs_pointer(path)
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: is not a readable parquet file ({one_line(error)[:200]}); restore it") from error


def python_rows(table: pa.Table, path: Path, limits: LimitsConfig, *, before: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of a table of episodes or tasks as Python values, few at a time.

    Args:
        before: rows of the same kind in other files.

    Raises:
        UserError: more of them, or of the texts in their lists, than `limits.episodes`.
    """
    lists = [column for column in table.columns if pa.types.is_list(column.type) or pa.types.is_large_list(column.type)]
    refuse_many(max(table.num_rows, *(len(pc.list_flatten(column)) for column in lists), 0) + before, path, limits)
    for batch in table.to_batches(max_chunksize=_ROWS):
        yield from batch.to_pylist()


def refuse_many(count: int, path: Path, limits: LimitsConfig) -> None:
    """Return unless there are more than `limits.episodes` rows in tables whose rows are all held."""
    if count > limits.episodes:
        raise UserError(
            f"{path}: has more than data.limits.episodes={limits.episodes} entries; divide it or raise that"
        )


def _read(path: Path, limits: LimitsConfig, columns: Sequence[str] | None) -> pa.Table:
    # The file alone: a folder like `chunk-000` beside it must not be taken for a partition column.
    schema = pq.ParquetFile(path).schema
    leaves = [schema.column(i) for i in range(len(schema))]
    file = pq.ParquetFile(path, read_dictionary=[leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"])
    names = file.schema_arrow.names if columns is None else list(columns)
    wanted = [i for i, leaf in enumerate(leaves) if leaf.path.partition(".")[0] in names or leaf.path in names]
    _refuse_large(_least(file, wanted), path, limits)
    plain = pa.schema([pa.field(name, _without_dictionaries(file.schema_arrow.field(name).type)) for name in names])
    batches, size = [], 0
    for group in range(file.num_row_groups):  # each has dictionaries of its own, which one batch cannot have two of
        for batch in file.iter_batches(row_groups=[group], columns=columns):
            size += sum(map(_decoded_bytes, batch.columns))
            _refuse_large(size, path, limits)
            batches.append(batch.select(names).cast(plain))
    return pa.Table.from_batches(batches, plain)


def _refuse_large(size: int, path: Path, limits: LimitsConfig) -> None:
    if size > limits.table_bytes:
        raise UserError(
            f"{path}: takes more than data.limits.table_mb={limits.table_mb:g} in memory; divide it or raise that"
        )


def _least(file: pq.ParquetFile, wanted: Sequence[int]) -> int:
    """Bytes that the columns take at least, by the footer."""
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    chunks = [group.column(i) for group in groups for i in wanted]
    texts = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.physical_type not in _WIDTHS)
    return _TEXT * texts + sum(chunk.num_values * _WIDTHS.get(chunk.physical_type, _INDEX) for chunk in chunks)


def _without_dictionaries(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_dictionaries(field.type)) for field in kind])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        field = kind.value_field.with_type(_without_dictionaries(kind.value_type))
        return pa.list_(field) if pa.types.is_list(kind) else pa.large_list(field)
    return kind


def _decoded_bytes(array: pa.Array) -> int:
    """Bytes that an array costs without dictionaries."""
    if pa.types.is_struct(array.type):
        return sum(map(_decoded_bytes, array.flatten()))
    if pa.types.is_dictionary(array.type) and array.type.value_type in (pa.string(), pa.binary()):
        lengths = pc.cast(pc.binary_length(array.dictionary), pa.int64())
        return array.indices.nbytes + _TEXT * (pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return 8 * len(array) + _decoded_bytes(array.flatten())
    return array.nbytes
