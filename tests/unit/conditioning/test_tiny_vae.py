"""The small learned codec: geometry, causality, weights, what it refuses; its training, which goes on exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.codec import reconstruction
from kairos_train.basics.errors import UserError
from kairos_train.conditioning.interfaces import VideoEncoder
from kairos_train.conditioning.tiny_vae import TinyAutoencoder, TinyVAE
from kairos_train.config.codec_recipe import CodecRecipe
from kairos_train.training.codec import _Training, train_codec

RECIPE = CodecRecipe(steps=4, batch=2, crop=16, workers=0, save_every=1)


def written(folder: Path) -> Path:
    """A file of random weights."""
    torch.manual_seed(0)
    model = TinyAutoencoder()
    model.mean.copy_(torch.linspace(-1, 1, 16))
    model.std.copy_(torch.linspace(0.5, 2, 16))
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tiny_vae"))


def clip(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_geometry_is_that_of_the_wan_vae(weights):
    codec = TinyVAE(weights)
    assert isinstance(codec, VideoEncoder)
    for count, latent_frames in ((1, 1), (5, 2), (9, 3)):
        latents = codec.encode(clip(2, count, 24, 40, 3))
        assert (latents.shape, latents.dtype) == ((2, 16, latent_frames, 3, 5), torch.float32)
        decoded = codec.decode(latents)
        assert (decoded.shape, decoded.dtype) == ((2, count, 24, 40, 3), torch.uint8)
    with pytest.raises(UserError, match=r"4k \+ 1"):
        codec.encode(clip(1, 4, 16, 16, 3))


def test_no_latent_frame_and_no_picture_depends_on_later_ones(weights):
    codec = TinyVAE(weights)
    frames = clip(1, 13, 16, 16, 3)
    latents = codec.encode(frames)
    for kept in (1, 5, 9):
        fewer = codec.encode(frames[:, :kept])
        torch.testing.assert_close(fewer, latents[:, :, : fewer.shape[2]])
        decoded = codec.decode(latents)[:, :kept].int()
        assert (codec.decode(fewer).int() - decoded).abs().max() <= 1  # rounding


def test_latents_are_normalised_by_the_weights_own_mean_and_spread(weights):
    model = TinyAutoencoder()
    model.load_state_dict(load_file(weights))
    pixels = clip(1, 5, 16, 16, 3).permute(0, 1, 4, 2, 3) / 127.5 - 1
    with torch.no_grad():
        latents = model.encode(pixels)
    expected = (latents[0, :, 0, 0, 0] - model.mean) / model.std
    found = TinyVAE(weights).encode(clip(1, 5, 16, 16, 3))
    torch.testing.assert_close(found[0, :, 0, 0, 0], expected)
    torch.testing.assert_close(model.denormalized(model.normalized(latents)), latents)


def test_the_identity_is_of_the_weights_and_of_no_path(weights, tmp_path):
    again = written(tmp_path)
    assert TinyVAE(weights).identity == TinyVAE(again).identity
    tensors = load_file(again)
    tensors["decoder.out.bias"] += 1
    save_file(tensors, again)
    assert TinyVAE(weights).identity != TinyVAE(again).identity


def test_weights_that_are_missing_broken_or_of_another_model_are_refused(weights, tmp_path):
    with pytest.raises(UserError, match=r"encoders.video.path: .*does not exist"):
        TinyVAE(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=r"encoders.video.path: not set, but"):
        TinyVAE(None)
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match=r"encoders.video.path: .*cannot be read"):
        TinyVAE(tmp_path / "text.safetensors")
    save_file({"mean": torch.zeros(16)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"tensor decoder.coarse.0.depthwise.bias is missing, this codec has \(128,\)"):
        TinyVAE(tmp_path / "other.safetensors")


def test_training_that_was_stopped_goes_on_as_if_it_never_had(shards, tmp_path):
    whole = train_codec([shards, shards], tmp_path / "whole", RECIPE, say=lambda line: None)

    class Stopped(Exception):
        pass

    def stop(line: str) -> None:
        if "step 3" in line:
            raise Stopped

    with pytest.raises(Stopped):
        train_codec([shards, shards], tmp_path / "halves", RECIPE, say=stop, say_every=1)
    assert (tmp_path / "halves.training.pt").exists()
    lines: list[str] = []
    halves = train_codec([shards, shards], tmp_path / "halves", RECIPE, say=lines.append)
    assert lines == ["continues at step 2 of 4"]
    assert halves["weights"] == whole["weights"]
    assert json.loads((tmp_path / "halves" / "codec.json").read_text())["shards"] == whole["shards"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["halves", "whole"]


def test_what_is_kept_is_the_average_of_the_weights(shards):
    training = _Training([shards], RECIPE)
    training.average = {name: torch.full_like(value, 0.25) for name, value in training.average.items()}
    kept = training.finish()
    assert all((parameter == 0.25).all() for parameter in kept.parameters())


@pytest.mark.slow
def test_training_lowers_the_error_and_measures_the_latents(shards, tmp_path):
    lines: list[str] = []
    recipe = replace(RECIPE, steps=60, save_every=1000)
    train_codec([shards], tmp_path / "codec", recipe, say=lines.append, say_every=15)
    first, *_, last = (float(line.split()[-5]) for line in lines)
    assert last > first + 3
    codec = TinyVAE(tmp_path / "codec" / "model.safetensors")
    found = reconstruction(codec, shards, windows=4)
    assert found["windows"] == 4
    assert found["db"] > last - 3  # whole pictures by the averaged weights
    assert found["moving_db"] < found["db"]


def test_a_state_of_another_training_is_refused(shards, tmp_path):
    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_codec([shards], tmp_path / "codec", replace(RECIPE, steps=3), say=stop, say_every=2)
    with pytest.raises(UserError, match="is of another training"):
        train_codec([shards], tmp_path / "codec", RECIPE)
    (tmp_path / "codec.training.pt").write_bytes(b"PK no state")
    with pytest.raises(UserError, match=r"codec.training.pt: cannot be read \(.*; remove it to begin again"):
        train_codec([shards], tmp_path / "codec", RECIPE)
    (tmp_path / "codec.training.pt").unlink()
    (tmp_path / "codec").mkdir()
    with pytest.raises(UserError, match="exists; name a new folder"):
        train_codec([shards], tmp_path / "codec", RECIPE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop": 20}, "--crop 20: must be a multiple of 8"),
        ({"lr": 0.0}, "--lr 0.0: must be above 0"),
        ({"lr": float("nan")}, "--lr nan: must be above 0"),
        ({"batch": 1}, "--batch 1: must hold a crop of each of 2 folders"),
    ],
)
def test_a_recipe_that_cannot_be_trained_by_is_refused(shards, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        train_codec([shards, shards], tmp_path / "codec", replace(RECIPE, **change))
    assert not list(tmp_path.iterdir())
