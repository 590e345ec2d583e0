"""The weight-free video codec: its definition, its spread and its loss on real clips; which encoders may be mixed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kairos_train.basics.errors import UserError
from kairos_train.conditioning.block_dct import DIVISORS, ZIGZAG, BlockDCT
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.interfaces import VideoEncoder, identities_match, latent_shape, weights_sha256
from kairos_train.config.schema import EncodersConfig, TextEncoderConfig, VideoEncoderConfig

CLIPS = {  # clip -> least PSNR of a first frame, dB
    "droid_exterior_image_1_left.mp4": 25.0,
    "droid_wrist_image_left.mp4": 27.0,
    "kairos_libero_plus_demo_1.mp4": 26.0,
    "carphone_pristine.mp4": 25.0,
}


def _clip(path: Path, count: int) -> torch.Tensor:
    """uint8 (1,count,H,W,3) of consecutive frames, cut to multiples of 8."""
    import av

    with av.open(path) as container:
        pictures = [f.to_ndarray(format="rgb24") for _, f in zip(range(count), container.decode(video=0))]
    frames = torch.from_numpy(np.stack(pictures))
    return frames[None, :, : frames.shape[1] // 8 * 8, : frames.shape[2] // 8 * 8]


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / (a.float() - b.float()).square().mean().item())


def _random(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_geometry_is_that_of_the_wan_vae():
    codec = BlockDCT()
    assert isinstance(codec, VideoEncoder)
    for count, latent_frames in ((1, 1), (5, 2), (9, 3)):
        latents = codec.encode(_random(2, count, 24, 40, 3))
        assert latents.shape == (2, 16, latent_frames, 3, 5)
        assert latents.dtype == torch.float32
        decoded = codec.decode(latents)
        assert decoded.shape == (2, count, 24, 40, 3)
        assert decoded.dtype == torch.uint8


def test_latents_are_the_written_definition_term_by_term():
    """Every channel of one block from sums over its pixels, written out."""
    frames = _random(1, 5, 16, 24, 3)
    latents = BlockDCT().encode(frames)
    row, column = 1, 2
    for latent_frame, group in ((0, frames[0, :1]), (1, frames[0, 1:])):
        block = group.double().mean(0)[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] / 127.5 - 1
        red, green, blue = block.unbind(-1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        planes = [luma] * 10 + [(blue - luma) / 1.772] * 3 + [(red - luma) / 1.402] * 3
        for channel, (plane, (u, v)) in enumerate(zip(planes, ZIGZAG + ZIGZAG[:3] * 2)):
            total = 0.0
            for y in range(8):
                for x in range(8):
                    waves = math.cos(math.pi * u * (y + 0.5) / 8) * math.cos(math.pi * v * (x + 0.5) / 8)
                    total += plane[y, x].item() * waves
            scale = (math.sqrt(0.5) if u == 0 else 1) * (math.sqrt(0.5) if v == 0 else 1) / 4
            expected = total * scale / DIVISORS[channel]
            assert latents[0, channel, latent_frame, row, column].item() == pytest.approx(expected, abs=2e-5)


def test_zigzag_is_jpegs():
    assert ZIGZAG == ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0))


def test_grey_is_zero_and_white_is_the_divisor_of_the_mean():
    latents = BlockDCT().encode(torch.full((1, 1, 8, 8, 3), 255, dtype=torch.uint8))
    assert latents[0, 0].item() == pytest.approx(8 / DIVISORS[0], rel=1e-6)
    assert latents[0, 1:].abs().max() < 1e-5
    middle = (BlockDCT().encode(torch.full((1, 1, 8, 8, 3), c, dtype=torch.uint8)) for c in (127, 128))
    assert sum(middle).abs().max() < 1e-5


def test_encoding_what_was_decoded_changes_nothing_but_rounding():
    codec = BlockDCT()
    latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(0)) * 0.2
    again = codec.encode(codec.decode(latents))
    # Rounding to bytes is noise of 0.29/127.5 per pixel; the divisor of 0.2 makes most of it.
    assert (again - latents).abs().max() < 0.1
    assert (again - latents).std() < 0.02


def test_frames_within_a_group_of_four_decode_to_their_mean():
    codec = BlockDCT()
    frames = torch.zeros(1, 5, 8, 8, 3, dtype=torch.uint8)
    for i, value in enumerate((10, 20, 40, 80, 100)):
        frames[:, i] = value
    decoded = codec.decode(codec.encode(frames))
    assert decoded[0, :, 0, 0, 0].tolist() == [10, 60, 60, 60, 60]


def test_each_clip_of_a_batch_is_encoded_as_it_is_alone():
    codec = BlockDCT()
    frames = _random(3, 9, 16, 16, 3)
    together = codec.encode(frames)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], codec.encode(frames[i : i + 1]), atol=1e-6, rtol=1e-5)


def test_every_grey_level_survives_exactly():
    codec = BlockDCT()
    frames = torch.arange(256, dtype=torch.uint8).repeat_interleave(8).view(1, 1, 1, 2048, 1).expand(1, 1, 8, 2048, 3)
    assert torch.equal(codec.decode(codec.encode(frames)), frames)


def test_decoding_clips_instead_of_wrapping_around():
    latents = torch.zeros(1, 16, 1, 1, 2)
    latents[0, 0, 0, 0] = torch.tensor([5.0, -5.0])
    decoded = BlockDCT().decode(latents)
    assert (decoded[..., :8, :] == 255).all()
    assert (decoded[..., 8:, :] == 0).all()


@pytest.mark.shared
@pytest.mark.parametrize("name", sorted(CLIPS))
def test_first_frames_of_real_clips_survive_the_round_trip(shared, name):
    codec = BlockDCT()
    frames = _clip(shared / "samples" / "clips" / name, 9)
    decoded = codec.decode(codec.encode(frames))
    assert _psnr(decoded[:, 0], frames[:, 0]) > CLIPS[name]


@pytest.mark.shared
def test_latents_of_real_clips_have_order_one_spread_in_every_channel(shared):
    """Flow matching mixes them with unit noise; single scenes differ by a factor of two or so either way."""
    codec = BlockDCT()
    latents = [codec.encode(_clip(shared / "samples" / "clips" / name, 9))[0].flatten(1) for name in CLIPS]
    spread = torch.cat([values[:, : 3 * 480] for values in latents], dim=1).std(1)
    assert spread.min() > 0.25
    assert spread.max() < 1.2


def test_frames_it_cannot_encode_are_refused():
    codec = BlockDCT()
    for count in (0, 2, 3, 4, 7, 8):
        with pytest.raises(UserError, match=f"frames: {count} video frames cannot be encoded; .* 4k \\+ 1"):
            codec.encode(torch.zeros(1, count, 8, 8, 3, dtype=torch.uint8))
    with pytest.raises(UserError, match="height: 12 pixels cannot be encoded; it must be a multiple of 8"):
        codec.encode(torch.zeros(1, 1, 12, 8, 3, dtype=torch.uint8))
    with pytest.raises(TypeError, match="uint8"):
        latent_shape(torch.zeros(1, 1, 8, 8, 3))


def _weight_free() -> EncodersConfig:
    return EncodersConfig(
        video=VideoEncoderConfig(kind="block_dct"),
        text=TextEncoderConfig(kind="hashed_ngrams", text_dim=16),
    )


def test_unknown_kinds_are_refused():
    config = _weight_free()
    config.video.kind = "wann"
    with pytest.raises(UserError, match=r"encoders\.video\.kind: 'wann'.*choose wan, tiny_vae or block_dct"):
        build_encoders(config)
    config = _weight_free()
    config.text.kind = "t5"
    with pytest.raises(UserError, match=r"encoders\.text\.kind: 't5'.*choose qwen or hashed_ngrams"):
        build_encoders(config)


def test_encoders_match_their_recorded_identity_and_no_other():
    identity = build_encoders(_weight_free()).identity
    identities_match(json.loads(json.dumps(identity)), identity)
    other = json.loads(json.dumps(identity))
    other["video"]["divisors"][0] = 8.0
    with pytest.raises(UserError, match=r"encoders\.video\.divisors: made with \[8\.0, 1\.0"):
        identities_match(other, identity)
    config = _weight_free()
    config.text.text_dim = 32
    with pytest.raises(UserError, match=r"encoders\.text\.text_dim: made with 16, this run has 32"):
        identities_match(identity, build_encoders(config).identity)
    wan = {"video": {"kind": "wan", "config_sha256": "0"}, "text": identity["text"]}
    with pytest.raises(UserError, match=r"encoders\.video\.kind: made with 'wan', this run has 'block_dct'"):
        identities_match(wan, identity)
    del other["text"]
    other["video"] = identity["video"]
    with pytest.raises(UserError, match=r"encoders\.text\.kind: made with 'nothing'"):
        identities_match(other, identity)


def test_weights_hash_sees_names_dtypes_shapes_and_values():
    state = {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(1.5)}
    base = weights_sha256(state)
    assert weights_sha256(dict(reversed(state.items()))) == base
    variants = [
        {**state, "a": torch.tensor([0.0, 1.0, 2.0, 4.0])},
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "a": torch.arange(4.0).view(torch.int32)},
        {"aa": state["a"], "b": state["b"], "c": state["c"]},
    ]
    assert len({base, *map(weights_sha256, variants)}) == 5
    # A view with strides hashes as what it shows.
    assert weights_sha256({"a": torch.arange(8.0)[::2]}) == weights_sha256({"a": torch.arange(0.0, 8.0, 2)})
