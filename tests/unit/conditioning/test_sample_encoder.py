"""Packing with the frozen encoders: what is cached is what they give, with the first frame and without it."""

import functools

import numpy as np
import pytest
import torch
from support.packed_samples import packed_samples
from support.toy_datasets import WINDOW, write_dataset
from test_qwen_vlm import PROMPTS, SYSTEM_MESSAGE, WIDTH, _save

from dataloaders.packing.pack import pack
from dataloaders.shards import read_index
from kairos_train.conditioning.build import build_encoders
from kairos_train.conditioning.sample_encoder import load_sample_encoder
from kairos_train.config.schema import EncodersConfig, TextEncoderConfig, VideoEncoderConfig


@pytest.fixture(scope="module", params=["hashed_ngrams", "qwen2_5_vl"])
def encoders(request, tmp_path_factory) -> EncodersConfig:
    text = TextEncoderConfig(kind="hashed_ngrams", text_dim=24, max_tokens=16)
    if request.param != "hashed_ngrams":
        corpus = [SYSTEM_MESSAGE, "system", "user", "assistant", *PROMPTS] * 3
        folder = _save(tmp_path_factory.mktemp("qwen"), request.param, corpus)
        text = TextEncoderConfig(kind="qwen", path=str(folder), text_dim=WIDTH)
    return EncodersConfig(video=VideoEncoderConfig(kind="block_dct"), text=text)


def test_cached_latents_and_contexts_are_the_encoders_own(encoders, tmp_path):
    dataset = write_dataset(tmp_path / "set", 2, caption_short=lambda i: PROMPTS[1])
    load = functools.partial(load_sample_encoder, encoders, "cpu")
    pack(dataset, tmp_path / "out", window=WINDOW, prompt_template="{task}", encoder=load)
    direct, index = build_encoders(encoders), read_index(tmp_path / "out")
    sees = direct.text.identity["image"]
    assert index.encoders == direct.identity
    empty, _ = direct.text.encode([""])
    np.testing.assert_allclose(index.empty_context(), empty[0].numpy(), rtol=2e-3, atol=2e-3)
    for sample in packed_samples(tmp_path / "out")[::4]:
        # the clip is stored lossily, so frames are compared loosely and texts closely
        latents = direct.video.encode(torch.from_numpy(sample.frames)[None])[0].numpy()
        assert np.abs(sample.arrays["latents"] - latents).mean() < 0.2
        for variant, stem in (("instruction", "context"), ("short", "context_short")):
            alone, mask = direct.text.encode([sample.meta["captions"][variant]])
            alone = alone[0][mask[0]].numpy()
            cached = sample.arrays[f"{stem}_text" if sees else stem].astype(np.float32)
            np.testing.assert_allclose(cached, alone, rtol=2e-3, atol=2e-3)
            if sees:  # text-to-video must not see the first frame; image-to-video must
                assert sample.arrays[stem].shape != alone.shape
        assert ("context_text" in sample.arrays) == sees
