"""The Wan VAE encoder: a tiny random model of the real class, saved in both formats the weights come in."""

import json
import re
from pathlib import Path

import pytest
import torch

from kairos_train.basics.errors import UserError
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import VideoEncoder, identities_match
from kairos_train.conditioning.wan_vae import WanVAE
from kairos_train.config.schema import EncodersConfig, TextEncoderConfig, VideoEncoderConfig


@pytest.fixture(scope="module")
def model():
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8).eval()
    with torch.no_grad():
        model.quant_conv.weight.mul_(4)  # a random encoder's latents hardly move otherwise
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pth(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original") / "Wan2.1_VAE.pth"
    torch.save({_original_key(key): tensor for key, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def encoder(folder) -> WanVAE:
    return WanVAE(folder)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.randint(0, 256, (2, 9, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def _original_key(key: str) -> str:
    """The name a tensor of AutoencoderKLWan has in Wan2.1_VAE.pth."""
    key = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", key))
    key = key.replace(".conv_in.", ".conv1.").replace(".norm_out.", ".head.0.").replace(".conv_out.", ".head.2.")
    key = key.replace(".mid_block.resnets.0.", ".middle.0.").replace(".mid_block.resnets.1.", ".middle.2.")
    key = key.replace(".mid_block.attentions.0.", ".middle.1.").replace(".down_blocks.", ".downsamples.")
    key = re.sub(r"\.up_blocks\.(\d)\.resnets\.(\d)", lambda m: f".upsamples.{4 * int(m[1]) + int(m[2])}", key)
    key = re.sub(r"\.up_blocks\.(\d)\.upsamplers\.0", lambda m: f".upsamples.{4 * int(m[1]) + 3}", key)
    if key.startswith(("encoder.middle.", "decoder.middle.", "encoder.downsamples.", "decoder.upsamples.")):
        for ours, theirs in (("norm1", 0), ("conv1", 2), ("norm2", 3), ("conv2", 6)):
            key = key.replace(f".{ours}.", f".residual.{theirs}.")
    return key.replace(".conv_shortcut.", ".shortcut.")


def test_latents_have_wans_geometry(encoder, frames):
    latents = encoder.encode(frames[:1])
    assert isinstance(encoder, VideoEncoder)
    assert latents.shape == (1, 16, 3, 4, 4)
    assert latents.dtype == torch.float32
    decoded = encoder.decode(latents)
    assert decoded.shape == (1, 9, 32, 32, 3)
    assert decoded.dtype == torch.uint8
    assert encoder.encode(frames[:, :1]).shape == (2, 16, 1, 4, 4)


@torch.no_grad()
def test_latents_are_the_normalised_mode_that_diffusers_gives(encoder, model, frames):
    pixels = torch.stack([frame.permute(3, 0, 1, 2) for frame in frames]).double().div(255).mul(2).sub(1).float()
    mode = model.encode(pixels).latent_dist.mode()
    latents = encoder.encode(frames)
    for channel in range(16):
        mean, std = model.config.latents_mean[channel], model.config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], (mode[:, channel] - mean) / std, atol=1e-4, rtol=1e-4)
    assert latents.std() > 1e-3


@torch.no_grad()
def test_decoding_is_diffusers_decoding_of_denormalised_latents(encoder, model):
    latents = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(model.config[name]).view(1, 16, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    pixels = model.decode(latents * std + mean).sample
    expected = ((pixels.permute(0, 2, 3, 4, 1) + 1) / 2 * 255).round()
    assert (encoder.decode(latents).float() - expected).abs().max() <= 1  # one step where rounding is a tie
    assert encoder.decode(latents).float().std() > 1


def test_the_original_pth_gives_the_same_encoder_as_the_diffusers_folder(encoder, pth, frames):
    original = WanVAE(pth)
    assert torch.equal(original.encode(frames[:1]), encoder.encode(frames[:1]))
    identities_match(encoder.identity, original.identity)


def test_a_pipeline_folder_is_searched_for_its_vae(encoder, folder, tmp_path):
    (tmp_path / "vae").symlink_to(folder)
    identities_match(encoder.identity, WanVAE(tmp_path).identity)


def test_sampled_latents_depend_on_the_clip_alone(encoder, folder, frames):
    sampler = WanVAE(folder, sample_posterior=True)
    together = sampler.encode(frames)
    alone = sampler.encode(frames[1:])
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)
    mode = encoder.encode(frames)
    assert (together - mode).abs().max() > 1e-3
    # One pixel apart: hardly another mode, but other noise.
    near = frames.clone()
    near[0, 0, 0, 0, 0] ^= 1
    moved_mode = (encoder.encode(near)[0] - mode[0]).abs().mean()
    assert (sampler.encode(near)[0] - together[0]).abs().mean() > 10 * moved_mode
    with pytest.raises(UserError, match=r"encoders\.sample_posterior: made with False, this run has True"):
        identities_match(encoder.identity, sampler.identity)


def test_identity_follows_weights_and_configuration(encoder, model, tmp_path):
    state = {_original_key(key): tensor.clone() for key, tensor in model.state_dict().items()}
    state["decoder.head.2.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"encoders\.weights_sha256"):
        identities_match(encoder.identity, WanVAE(tmp_path / "other.pth").identity)

    model.save_pretrained(tmp_path / "std")
    config = json.loads((tmp_path / "std" / "config.json").read_text())
    config["latents_std"][3] = 2.0
    (tmp_path / "std" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"encoders\.config_sha256"):
        identities_match(encoder.identity, WanVAE(tmp_path / "std").identity)


def test_weights_are_frozen(encoder, frames):
    assert not encoder._model.training
    assert not any(p.requires_grad for p in encoder._model.parameters())
    assert not encoder.encode(frames[:1, :1]).requires_grad


def test_frame_counts_other_than_4k_plus_1_and_odd_sizes_are_refused(encoder, frames):
    with pytest.raises(UserError, match="frames: 8 video frames"):
        encoder.encode(frames[:, :8])
    with pytest.raises(UserError, match="width: 30 pixels"):
        encoder.encode(frames[:, :, :, :30])


def _break(kind: str, tmp_path: Path, folder: Path, pth: Path) -> Path:
    """A path that does not lead to the weights, in the way that `kind` says."""
    target = tmp_path / "broken"
    state = torch.load(pth, weights_only=True)
    if kind == "empty folder":
        target.mkdir()
    elif kind in ("no weights", "other class", "broken config"):
        target.mkdir()
        config = json.loads((folder / "config.json").read_text())
        if kind == "other class":
            config["_class_name"] = "AutoencoderKL"
        (target / "config.json").write_text("{" if kind == "broken config" else json.dumps(config))
    elif kind == "folder lacks a tensor":
        from safetensors.torch import load_file, save_file

        target.mkdir()
        (target / "config.json").symlink_to(folder / "config.json")
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        weights.pop("decoder.conv_out.bias")
        save_file(weights, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    elif kind == "text":
        target.write_text("not tensors")
    elif kind == "code":
        torch.save({"encoder.conv1.weight": Path("x")}, target)
    elif kind == "other tensors":
        torch.save({"weight": torch.zeros(1)}, target)
    elif kind == "lacks a tensor":
        del state["decoder.head.2.bias"]
        torch.save(state, target)
    elif kind == "other shapes":
        state["decoder.head.2.bias"] = torch.zeros(5)
        torch.save(state, target)
    elif kind == "other channels":
        from diffusers import AutoencoderKLWan

        AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "does not exist"),
        ("empty folder", "has no config.json"),
        ("no weights", "cannot be read"),
        ("broken config", "cannot be read"),
        ("other class", "describes AutoencoderKL, not AutoencoderKLWan"),
        ("folder lacks a tensor", "lacks 1 tensors, the first decoder.conv_out.bias"),
        ("text", "not a file of plain tensors"),
        ("code", "not a file of plain tensors"),
        ("other tensors", "does not hold the original Wan2.1 VAE"),
        ("lacks a tensor", "lacks 1 tensors, the first decoder.conv_out.bias"),
        ("other shapes", "tensors of other shapes"),
        ("other channels", "4 latent channels, Wan2.1 has 16"),
    ],
)
def test_what_is_not_the_vae_is_refused_in_one_line(kind, message, tmp_path, folder, pth):
    with pytest.raises(UserError, match=message) as error:
        WanVAE(_break(kind, tmp_path, folder, pth))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("encoders.video.path: ")


def test_no_path_is_refused_and_build_passes_the_settings_on(folder):
    text = TextEncoderConfig(kind="hashed_ngrams", text_dim=16)
    with pytest.raises(UserError, match=r"encoders\.video\.path: not set"):
        build_encoders(EncodersConfig(text=text))
    config = EncodersConfig(video=VideoEncoderConfig(path=str(folder), sample_posterior=True), text=text)
    assert build_encoders(config).identity["video"]["sample_posterior"] is True
