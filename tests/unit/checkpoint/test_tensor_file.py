"""The project's own reader and writer of safetensors beside the library's."""

import hashlib
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kairos_train.basics.errors import MachineFault, UserError
from kairos_train.checkpoint.tensor_file import AHEAD, CHUNK, DTYPES, Stored, TensorFile, split_by_size, write_tensors


def every_dtype() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, 4, generator=rng) * 3
    tensors = {
        code: values.abs().to(dtype) if dtype == torch.uint8 else values.to(dtype) for code, dtype in DTYPES.items()
    }
    return tensors | {"scalar": torch.tensor(-0.0), "empty": torch.empty(0, 3), "bits": torch.tensor([torch.nan, -0.0])}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def bits(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def test_what_the_library_wrote_is_read_and_the_other_way_round(tmp_path):
    tensors = every_dtype()
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"a": "b"})
    ours = write_tensors(tmp_path / "ours.safetensors", {k: Stored.of(t) for k, t in tensors.items()}, {"a": "b"})
    assert ours["bytes"] == (tmp_path / "ours.safetensors").stat().st_size
    for name in ("theirs", "ours"):
        file = TensorFile(tmp_path / f"{name}.safetensors")
        assert file.metadata == {"a": "b"}
        assert all(same(file.read(key), tensor) for key, tensor in tensors.items())
    back = load_file(tmp_path / "ours.safetensors")
    assert all(same(back[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("two_threads", [True, False])
def test_the_digest_is_that_of_the_file_however_it_is_hashed(tmp_path, two_threads):
    rng = torch.Generator().manual_seed(0)
    sizes = (3, AHEAD // 8 + 5, CHUNK // 4, 7, AHEAD // 8)
    tensors = {f"w{i}": torch.randn(n, generator=rng) for i, n in enumerate(sizes)}
    path = tmp_path / "file.safetensors"
    told = write_tensors(path, {k: Stored.of(t) for k, t in tensors.items()}, two_threads=two_threads)
    assert told == {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert all(same(TensorFile(path).read(key), tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    "box",
    [
        (slice(1, 3),),
        (slice(None), slice(2, 3)),
        (slice(4, 5), slice(0, 2), slice(1, 4)),
        (slice(2, 2),),
        (slice(3, 99),),
    ],
)
def test_a_box_is_what_indexing_gives(tmp_path, box):
    tensor = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file({"other": torch.zeros(7), "x": tensor}, tmp_path / "file.safetensors")
    assert same(TensorFile(tmp_path / "file.safetensors").read("x", box), tensor[box])


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.ones(100)}, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"file\.safetensors: ends within tensor 'x'"):
        file.read("x")


def write_raw(path: Path, header: str | bytes, nbytes: int) -> Path:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(nbytes))
    return path


def x(shape: str, begin: int, end: int, dtype: str = '"F32"') -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":[{begin},{end}]}}'


@pytest.mark.parametrize(
    ("header", "nbytes"),
    [
        (f'{{"x":{x("[2]", 0, 8)},"y":{x("[2]", 4, 12)}}}', 12),  # overlap
        (f'{{"x":{x("[2]", 0, 8)},"y":{x("[2]", 0, 8)}}}', 8),  # the same bytes twice
        (f'{{"x":{x("[2]", 0, 8)},"y":{x("[1]", 12, 16)}}}', 16),  # a hole
        (f'{{"x":{x("[2]", 4, 12)}}}', 12),  # a hole at the beginning
        (f'{{"x":{x("[2]", 0, 8)},"y":{x("[0]", 4, 4)}}}', 8),  # nothing, inside of another
        (f'{{"x":{x("[2]", 0, 8)}}}', 12),  # bytes of no tensor at the end
        ("{}", 4),
        (f'{{"x":{x("[2]", 0, 8)},"x":{x("[1]", 8, 12)}}}', 12),  # one name, two tensors
        (f'{{"x":{x("[2]", 0, 8)},"x":{x("[2]", 0, 8)}}}', 8),
        (f'{{"__metadata__":{{"a":"1","a":"2"}},"x":{x("[2]", 0, 8)}}}', 8),
        (f'{{"x":{x("[2]", 0, 4)}}}', 8),
        (f'{{"x":{x("[-2]", 0, -8)}}}', 8),
        (f'{{"x":{x("[2]", 0, 8)}}}', 4),  # cut off
        (f'{{"x":{x("[true,2]", 0, 8)}}}', 8),
        (f'{{"x":{x("[2.0]", 0, 8)}}}', 8),
        (f'{{"x":{x("[9223372036854775808,4]", 0, 8)}}}', 8),
        (f'{{"x":{x("[1" + 400 * "0" + "]", 0, 8)}}}', 8),
        (f'{{"__metadata__":{{"a":1}},"x":{x("[2]", 0, 8)}}}', 8),
        (f'{{"x":{x("[2]", 0, 8)}}}'.encode("utf-16-le"), 8),
        ('{"x":{"shape":[2]}}', 8),
        ("[]", 0),
        ("{", 0),
        ("[" * 200_000, 0),
        ('{"__metadata__":' + '{"a":' * 100_000, 0),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, nbytes):
    path = write_raw(tmp_path / "file.safetensors", header, nbytes)
    with pytest.raises(UserError, match=r"file\.safetensors: is no safetensors file \(.*\); get the file again$"):
        TensorFile(path)


def test_tensors_of_types_that_are_not_known_here_are_named(tmp_path):
    path = write_raw(tmp_path / "file.safetensors", f'{{"x":{x("[4]", 0, 8, chr(34) + "U16" + chr(34))}}}', 8)
    with pytest.raises(UserError, match="a tensor is of type 'U16', must be one of F64"):
        TensorFile(path)


@settings(max_examples=150, deadline=None, database=None)
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_of_a_file_with_a_wrong_byte_no_more_is_taken_than_by_the_library(tmp_path_factory, at, byte):
    path = tmp_path_factory.getbasetemp() / "one_byte.safetensors"
    save_file({"x": torch.arange(6.0).reshape(2, 3), "y": torch.arange(5, dtype=torch.uint8)}, path, {"a": "b"})
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content)
    try:
        theirs = load_file(path)
    except (SafetensorError, OSError):
        with pytest.raises(UserError):
            TensorFile(path)
        return
    file = TensorFile(path)
    assert file.shapes.keys() == theirs.keys()
    assert all(same(file.read(key), tensor) for key, tensor in theirs.items())


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name), lambda path: None])
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    path = tmp_path / "file.safetensors"
    make(path)
    with pytest.raises(UserError, match=r"file\.safetensors: cannot be read \("):
        TensorFile(path)


def test_a_disk_that_fails_while_a_tensor_is_read_is_a_fault_of_the_machine(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file({"x": torch.ones(100)}, path)
    file = TensorFile(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(MachineFault, match=r"file\.safetensors: cannot be read \(Is a directory\).*start it again"):
        file.read("x")


def test_groups_stay_below_the_size_and_keep_the_order():
    tensors = {f"t{i}": Stored.of(torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate((3, 4, 9, 1, 1, 20, 1))}
    groups = [list(group) for group in split_by_size(tensors, 10)]
    assert groups == [["t0", "t1"], ["t2", "t3"], ["t4"], ["t5"], ["t6"]]
