"""Which context a sample is given: with or without the picture, and which of its captions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dataloaders.loading.batch import Sample, collate
from dataloaders.shards import read_index
from kairos_train.basics.errors import UserError
from kairos_train.config.schema import CaptionShare
from kairos_train.objective.randomness import Choices
from kairos_train.training.inputs.contexts import Contexts, caption_shares, check_captions

CPU = torch.device("cpu")
TEXTS = {"instruction": "pick", "detailed": "a long story"}


class Encoder:
    """Tells what it was asked: token 0 is the caption's length, one token a word; pictures add a token."""

    text_dim, identity = 2, {"kind": "telling", "image": True}

    def encode(self, prompts, images=None):
        rows = [len(p.split()) + (images is not None) for p in prompts]
        mask = torch.arange(max(rows)) < torch.tensor(rows)[:, None]
        context = torch.zeros(len(prompts), max(rows), 2)
        for i, prompt in enumerate(prompts):
            context[i, : rows[i], 0] = len(prompt)
            context[i, : rows[i], 1] = 0 if images is None else float(images[i, 0, 0, 0])
        return context, mask


def choices(condition="ti2v", caption=0.0):
    return Choices(condition, False, 0, 0, caption)


def sample(key="s", captions=TEXTS, picture=7, cached=False):
    primary = next(iter(captions), None)
    meta = {"text": captions.get(primary, ""), "captions": captions, "primary_caption": primary}
    frames = np.full((5, 2, 2, 3), picture, np.uint8)
    frames[1:] = 99  # only the first one is shown
    contexts = {}
    for name, text in captions.items() if cached else ():
        stem = "" if name == primary else name
        for image, member in ((frames, stem), (None, f"{stem}_text" if stem else "text")):
            images = None if image is None else torch.from_numpy(image[:1])
            context, mask = Encoder().encode([text], images)
            contexts[member] = context[0, mask[0]].numpy()
    return Sample(key, frames, None, contexts, None, None, meta)


def contexts(captions=()):
    return Contexts(captions, Encoder(), sees_pictures=True, device=CPU)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("condition", "picture"), [("ti2v", 7), ("t2v", 0), ("i2v", 0), ("null2v", 0), ("t2i", 0)])
def test_only_text_and_image_to_video_sees_the_picture(condition, picture, cached):
    batch = collate([sample(cached=cached)])
    context, mask = contexts().of(batch, [choices(condition)], progress=0.0)
    assert context[0, 0].tolist() == [len("pick"), picture]
    assert mask.sum() == 1 + (picture > 0)


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_mixes_conditions_and_captions(cached):
    batch = collate([sample("a", cached=cached), sample("b", picture=9, cached=cached), sample("c", cached=cached)])
    schedule = [CaptionShare("detailed", 1.0)]
    context, mask = contexts(schedule).of(batch, [choices("t2v"), choices("ti2v"), choices("t2v")], progress=0.5)
    assert context[:, 0].tolist() == [[12.0, 0.0], [12.0, 9.0], [12.0, 0.0]]
    assert mask.sum(1).tolist() == [3, 4, 3]
    assert not context[~mask].any()


def test_the_share_of_a_caption_changes_over_the_stage():
    schedule = [CaptionShare("detailed", 1.0, 0.0), CaptionShare("instruction", 0.0, 1.0)]
    assert caption_shares(schedule, 0.25) == {"detailed": 0.75, "instruction": 0.25}
    assert caption_shares([CaptionShare("x", 0.3)], 0.9) == {"x": 0.3}
    chosen, draws = contexts(schedule), np.linspace(0, 0.999, 200)
    batch = collate([sample(str(i)) for i in range(200)])
    for progress in (0.0, 0.25, 0.75, 1.0):
        context, _ = chosen.of(batch, [choices(caption=draw) for draw in draws], progress=progress)
        assert (context[:, 0, 0] == 12).float().mean().item() == pytest.approx(1 - progress, abs=0.01)


def test_a_sample_with_some_of_the_captions_draws_among_those_by_their_shares():
    shares = [
        CaptionShare("detailed", start=0.5),
        CaptionShare("instruction", start=0.25),
        CaptionShare("x", start=0.25),
    ]
    batch = collate([sample(), sample(captions={"instruction": "pick", "x": "other thing"})])
    for draw, first, second in (
        (0.4, "a long story", "pick"),
        (0.6, "a long story", "other thing"),
        (0.7, "pick", "other thing"),
    ):
        context, _ = contexts(shares).of(batch, [choices("t2v", draw)] * 2, progress=0.0)
        assert context[:, 0, 0].tolist() == [len(first), len(second)]


def test_a_sample_without_the_captions_of_the_schedule_gives_its_primary_one():
    schedule = [CaptionShare("detailed", 1.0), CaptionShare("short", 1.0)]
    batch = collate([sample(captions={"instruction": "pick"}), sample(captions=TEXTS), sample(captions={})])
    context, mask = contexts(schedule).of(batch, [choices("t2v", 0.99)] * 2 + [choices("null2v")], progress=0.0)
    assert context[:2, 0, 0].tolist() == [4, 12]
    assert mask.sum(1).tolist() == [1, 3, 0]


def test_a_cached_context_that_is_needed_and_missing_is_named():
    raw = sample(cached=True)
    batch = collate([replace(raw, contexts={"": raw.contexts[""]})])
    with pytest.raises(UserError, match=r"sample s lacks context_text\.npy: pack the source again with --encode"):
        contexts().of(batch, [choices("t2v")], progress=0.0)


def test_a_schedule_of_captions_that_no_source_has_is_refused(shards):

    index = read_index(shards)
    check_captions([CaptionShare("instruction")], [index])
    with pytest.raises(UserError, match=r"no source has a caption called 'detailed'; there are: instruction"):
        check_captions([CaptionShare("detailed")], [index])
