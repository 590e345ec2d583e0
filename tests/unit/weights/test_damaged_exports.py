"""What is loaded is what was exported, byte by byte; nothing is built by what a damaged or made-up file says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tiny_export import tiny_config, write_tiny_checkpoint

from kairos_train.basics.errors import UserError
from kairos_train.basics.files import describe_file
from kairos_train.basics.log import logger
from kairos_train.checkpoint.canonical import manifest_digest, to_json
from kairos_train.cli import main
from kairos_train.inference import export_files
from kairos_train.inference.fingerprint import fingerprint
from kairos_train.inference.load import load
from kairos_train.inference.sampler import SamplerConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.public_keys import refuse_larger
from kairos_train.weights.export import export

WEIGHTS = "model-00001-of-00001.safetensors"
READ = ("config.json", "sampler.json", "dataset_stats.json", "model.safetensors.index.json", WEIGHTS)


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "export")


def edit(folder: Path, name: str, change: Callable[[dict], object], *, listed: bool = False) -> None:
    """Change a JSON file; `listed`: by somebody who writes its new digest into the manifest as well."""
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    if listed:
        edit(folder, "manifest.json", lambda m: m["files"].update({name: describe_file(folder / name)}))


@pytest.mark.parametrize("at", [-4096, 40_000])
def test_weights_of_which_4_kilobytes_are_others_are_refused(folder, at):
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    begin = at % len(content)
    content[begin : begin + 4096] = bytes(4096)
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{WEIGHTS}: is not the one that was exported, or damaged \(its SHA-256") as e:
        load(folder)
    assert "\n" not in str(e.value)
    assert main(["serve", str(folder), "--port", "0"]) == 2
    assert load(folder, verify=False).model is not None, "whoever looks away gets them"


def test_weights_of_the_same_shape_are_exchanged_for_nobody(folder):
    with safe_open(folder / WEIGHTS, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: 2 * w for name, w in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS, metadata=metadata)
    with pytest.raises(UserError, match=f"{WEIGHTS}: is not the one that was exported"):
        load(folder)


@pytest.mark.parametrize("name", READ)
def test_every_file_that_is_read_is_listed_and_there(folder, name):
    edit(folder, "manifest.json", lambda m: m["files"].pop(name))
    with pytest.raises(UserError, match=rf"manifest\.json: does not list {name}"):
        load(folder)


@pytest.mark.parametrize("name", ["dataset_stats.json", "model.safetensors.index.json"])
def test_a_blank_more_is_another_file(folder, name):
    (folder / name).write_text((folder / name).read_text() + " ")
    with pytest.raises(UserError, match=f"{name}: is not the one that was exported"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (Path.unlink, r"manifest\.json: not found; write the folder again"),
        (lambda path: path.write_text("[" * 200_000), r"manifest\.json: is not JSON"),
        (lambda path: path.write_text("{}"), r"manifest\.json: lists no files"),
        (lambda path: path.write_text('{"files": {"a": 3}}'), r"manifest\.json: lists no files"),
        (lambda path: (path.unlink(), path.mkdir()), r"manifest\.json: cannot be read"),
    ],
)
def test_an_export_without_its_manifest_is_refused(folder, change, match):
    change(folder / "manifest.json")
    with pytest.raises(UserError, match=match):
        load(folder)
    load(folder, verify=False)


def test_looking_away_and_edits_are_said(folder, caplog):
    caplog.set_level("INFO", logger=logger.name)
    load(folder)
    assert caplog.messages == []
    edit(folder, "sampler.json", lambda s: s.update(steps=4))
    load(folder)
    assert caplog.messages == [f"{folder / 'sampler.json'}: was edited after the export"]
    load(folder, verify=False)
    assert "verify=False: its files are not compared with manifest.json" in caplog.messages[-1]


def test_weights_are_hashed_as_a_stream(folder, monkeypatch):
    """No file of weights is ever in memory as a whole before it is known to be the right one."""
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read at once"))
    monkeypatch.setattr(export_files, "safe_open", lambda *how: pytest.fail("opened before it was compared"))
    (folder / WEIGHTS).write_bytes(b"x" + (folder / WEIGHTS).open("rb").read()[1:])
    with pytest.raises(UserError, match=f"{WEIGHTS}: is not the one"):
        load(folder)


ABSURD = {
    "num_layers=1000000000": lambda m: m.update(num_layers=10**9),
    "num_layers=0": lambda m: m.update(num_layers=0),
    "num_layers=-4": lambda m: m.update(num_layers=-4),
    "num_layers=True": lambda m: m.update(num_layers=True),
    "text_dim=1000000000000": lambda m: m.update(text_dim=10**12),
    "num_heads=1000000": lambda m: m.update(num_heads=10**6),
    "video.ffn_dim=4611686018427387904": lambda m: m["video"].update(ffn_dim=2**62),
    "video.gdn_conv_size=100000": lambda m: m["video"].update(gdn_conv_size=10**5),
    r"video.patch_size\[1\]=100000": lambda m: m["video"].update(patch_size=[1, 10**5, 2]),
    "action.dim=1e400": lambda m: m["action"].update(dim="1e400"),
}


@pytest.mark.parametrize(("words", "change"), ABSURD.items(), ids=ABSURD)
def test_no_model_is_built_that_its_tensors_have_no_room_for(folder, monkeypatch, words, change):
    """By somebody who also writes the new fingerprint and the new digests."""

    def rewrite(config: dict) -> None:
        change(config["run"]["model"])
        with safe_open(folder / WEIGHTS, "pt") as opened:
            parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
            table = {key: (part.get_dtype(), tuple(part.get_shape())) for key, part in parts.items()}
        config["fingerprint"] = fingerprint(config, table)

    edit(folder, "config.json", rewrite, listed=True)
    edit(
        folder,
        "sampler.json",
        lambda s: s.update(fingerprint=json.loads((folder / "config.json").read_text())["fingerprint"]),
        listed=True,
    )
    monkeypatch.setattr(WorldActionModel, "__init__", lambda *how, **more: pytest.fail("a model was built"))
    with pytest.raises(UserError, match=rf"model\.{words}"):
        load(folder)


def test_a_checkpoint_with_an_absurd_configuration_is_not_exported(tmp_path):
    config = tiny_config(streams="video", actions=False)
    checkpoint = write_tiny_checkpoint(tmp_path, None, config=config)
    text = (checkpoint / "config.yaml").read_text().replace("num_layers: 4", "num_layers: 400000000")
    assert text.count("num_layers: 400000000") == 1
    (checkpoint / "config.yaml").write_text(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["config.yaml"] = describe_file(checkpoint / "config.yaml")
    manifest["sha256"] = manifest_digest(manifest)
    (checkpoint / "manifest.json").write_text(to_json(manifest))
    with pytest.raises(UserError, match=r"num_layers"):
        export(checkpoint, tmp_path / "out")


def test_sizes_up_to_those_of_the_tensors_pass():
    config = tiny_config().model
    shapes = {name: tuple(w.shape) for name, w in WorldActionModel(config).state_dict().items()}
    refuse_larger(config, shapes, "here")
    halved = {name: (*shape[:-1], -(-shape[-1] // 2)) for name, shape in shapes.items() if shape}
    refuse_larger(config, halved, "two int4 values in a byte")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(run=5), "has no 'run' as exports have it"),
        (lambda c: c["run"].update(model=[]), r"has no 'run\.model' as"),
        (lambda c: c["run"].update(encoders={"video": 3}), r"has no 'run\.encoders\.video' as"),
        (lambda c: c.update(quantization="int4"), "has no 'quantization' as"),
        (lambda c: c.update(robot=[]), "has no 'robot' as"),
        (lambda c: c.pop("fingerprint"), "has no 'fingerprint' as"),
        (lambda c: c.update(distilled="no"), "has no 'distilled' as"),
        (lambda c: c["run"]["model"]["video"].update(layer_cycle=["SWA", "LSTM"]), "LSTM"),
    ],
)
def test_a_config_of_other_parts_is_one_line(folder, change, match):
    edit(folder, "config.json", change)
    with pytest.raises(UserError, match=match) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("steps", [10**9, 1001, 0, True, "10", 10**400])
def test_no_sampler_takes_more_steps_than_training_knows_times(steps):
    with pytest.raises(UserError, match=r"sampler\.steps=.{1,40}: must be a whole number from 1 to 1000"):
        SamplerConfig(steps=steps).check()
    assert SamplerConfig(steps=1000).check().steps == 1000


@pytest.mark.parametrize("name", ["guidance", "action_shift"])
def test_numbers_of_a_sampler_are_finite(name):
    for value in (float("inf"), float("nan"), -1.0):
        with pytest.raises(UserError, match=rf"sampler\.{name}="):
            SamplerConfig(**{name: value}).check()
