"""Files as others leave them: Git LFS pointers in the place of weights, and texts in several encodings."""

import json
import shutil

import pytest
import torch
from support.tiny_export import write_tiny_checkpoint

from evaluation.quality import QualityModel
from kairos_train.basics.errors import UserError
from kairos_train.basics.files import read_json
from kairos_train.basics.foreign_files import decode_text, is_lfs_pointer, read_text
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.tensor_file import TensorFile
from kairos_train.conditioning import qwen_vlm, wan_vae
from kairos_train.inference.load import load
from kairos_train.weights.weights_source import WeightsSource

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"
MATCH = r": is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository$"


@pytest.mark.parametrize("name", ["weights.safetensors", "model.safetensors.index.json"])
def test_weights_to_import(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=name + MATCH):
        WeightsSource(tmp_path / name)


def test_a_file_behind_an_index(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(POINTER)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    with pytest.raises(UserError, match=r"a\.safetensors" + MATCH):
        WeightsSource(index)
    with pytest.raises(UserError, match=r"a\.safetensors" + MATCH):
        TensorFile(tmp_path / "a.safetensors")


@pytest.mark.parametrize("pattern", ["config.json", "sampler.json", "model-*.safetensors", "dataset_stats.json"])
def test_an_export(exported, tmp_path, pattern):
    folder = shutil.copytree(exported, tmp_path / "export")
    (path,) = folder.glob(pattern)
    path.write_bytes(POINTER)
    with pytest.raises(UserError, match=path.name + MATCH):
        load(folder)


def test_a_checkpoint(shards, tmp_path):
    folder = write_tiny_checkpoint(tmp_path, shards)
    (folder / "manifest.json").write_bytes(POINTER)
    with pytest.raises(UserError, match="manifest.json" + MATCH):
        CheckpointReader(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_encoders(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=name + MATCH):
        wan_vae._load(tmp_path)
    with pytest.raises(UserError, match=name + MATCH):
        qwen_vlm._settings(tmp_path)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(POINTER)
    with pytest.raises(UserError, match="VAE.pth" + MATCH):
        wan_vae._load(tmp_path / "Wan2.1_VAE.pth")


def test_judges(tmp_path):
    (tmp_path / "lpips.pt").write_bytes(POINTER)
    with pytest.raises(UserError, match="lpips.pt" + MATCH):
        QualityModel(tmp_path / "lpips.pt", option="lpips", device=torch.device("cpu"))


def test_what_only_mentions_one_is_none():
    assert is_lfs_pointer(POINTER)
    assert is_lfs_pointer(memoryview(POINTER))
    assert not is_lfs_pointer(b" " + POINTER)
    assert not is_lfs_pointer(b"version https://git-lfs")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_texts_are_decoded(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"a": "boîte\u2028"}'.encode(encoding))
    assert read_text(tmp_path / "a.json") == '{"a": "boîte\u2028"}'
    assert read_json(tmp_path / "a.json", remedy="x") == {"a": "boîte\u2028"}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (
            "a\nboîte".encode("latin-1"),
            r"^x: is not UTF-8 \(byte 0xee in line 2; Latin-1 or Windows-1252\?\); convert",
        ),
        ("boite".encode("utf-16-be"), r"^x: is not UTF-8 \(it holds null bytes; UTF-16\?\)"),
        (b"\xff\xfea", r"^x: begins as UTF-16 and is not"),
        (POINTER, "^x" + MATCH),
    ],
)
def test_others_are_refused_by_name(data, match):
    with pytest.raises(UserError, match=match):
        decode_text(data, "x")
