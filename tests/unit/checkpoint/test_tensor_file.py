"""The project's own reader and writer of safetensors beside the library's."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from kairos_train.basics.errors import UserError
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


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ('{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', "has 4 bytes where its shape takes 8"),
        ('{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,-8]}}', "has -8 bytes"),
        ('{"x":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}', "ends at byte 12 of 8"),
        ('{"x":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}', "F99"),
        ('{"x":{"shape":[2]}}', "dtype"),
        ("[]", "is no readable safetensors file"),
        ("{", "is no readable safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, match):
    path = tmp_path / "file.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match=match):
        TensorFile(path)


def test_groups_stay_below_the_size_and_keep_the_order():
    tensors = {f"t{i}": Stored.of(torch.zeros(n, dtype=torch.uint8)) for i, n in enumerate((3, 4, 9, 1, 1, 20, 1))}
    groups = [list(group) for group in split_by_size(tensors, 10)]
    assert groups == [["t0", "t1"], ["t2", "t3"], ["t4"], ["t5"], ["t6"]]
