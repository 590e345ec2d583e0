"""Rollouts of many chunks: what each is given, what is carried over, and that no chunk costs more than another."""

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from support.allocations import peak_bytes
from support.model_factory import make_config, make_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kairos_train.basics.errors import UserError
from kairos_train.inference import sampler
from kairos_train.inference.rollout import ChunkSize, SlidingHistory, StreamingHistory, chunk_seed
from kairos_train.inference.sampler import Conditions, SamplerConfig, sample

FRAMES, KEEP, SIZE, ACTIONS = 5, 2, (4, 4), 6
NEW = FRAMES - KEEP
CHUNK = ChunkSize(frames=FRAMES, history=KEEP, horizon=ACTIONS)
CONFIG = SamplerConfig(steps=2, guidance=3.0)
WAYS = {"sliding": SlidingHistory, "carried": StreamingHistory}
SEEDS = (3, 4)


@pytest.fixture(scope="module")
def model():
    """Every kind of layer but FA, whose reach has no end; history is causal."""
    config = make_config(history_causal=True, layer_cycle=["SWA", "GATED", "DSWA", "SWA", "GATED"])
    return make_model(config).float().eval().requires_grad_(False)


def conditions(history_frames: int = KEEP) -> Conditions:
    g = torch.Generator().manual_seed(1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    history = torch.randn(2, 16, history_frames, *SIZE, generator=g) if history_frames else None
    return Conditions(torch.randn(2, 5, 12, generator=g), mask, history, torch.randn(2, 1, 5, generator=g))


def seeds(number: int) -> list[int]:
    return [chunk_seed(seed, number) for seed in SEEDS]


def begin(way: str, model, given: Conditions, config: SamplerConfig = CONFIG):
    history = WAYS[way](model, config, CHUNK)
    if given.history is not None:
        history.observe(given.history, given)
    return history


def chunks(history, given: Conditions, count: int, mode: str = "joint"):
    for number in range(count):
        sampled = history.sample(given, mode=mode, seeds=seeds(number), size=SIZE)
        yield sampled
        history.observe(sampled.latents, given)


@pytest.mark.parametrize("mode", ["video", "joint"])
def test_a_sliding_chunk_is_a_sample_behind_the_last_frames(model, mode):
    given = conditions()
    so_far = given.history
    for number, chunk in enumerate(chunks(begin("sliding", model, given), given, 3, mode)):
        expected = sample(
            model,
            replace(given, history=so_far[:, :, -KEEP:]),
            mode=mode,
            config=CONFIG,
            seeds=seeds(number),
            latent_shape=(FRAMES, *SIZE),
            horizon=ACTIONS,
        )
        assert chunk.latents.shape[2] == NEW
        assert torch.equal(chunk.latents, expected.latents[:, :, KEEP:])
        assert (chunk.actions is None) == (mode == "video")
        if mode == "joint":
            assert torch.equal(chunk.actions, expected.actions)
        so_far = torch.cat([so_far, chunk.latents], dim=2)


def recomputed(model, given: Conditions, so_far: torch.Tensor, number: int) -> torch.Tensor:
    """The next chunk's latents from plain passes over everything since the first frame."""
    sigmas = sampler.video_sigmas(CONFIG, FRAMES, 4)
    z = sampler.noise((16, FRAMES, *SIZE), seeds(number), "video")[:, :, KEEP:]
    known = so_far.shape[2]
    for step in range(CONFIG.steps):
        t = torch.full((2,), float(sigmas[step]) * 1000)
        whole = torch.cat([so_far, z], dim=2)
        velocity = [
            model(whole, context, given.context_mask, t, [known] * 2, state=given.state).video[:, :, known:]
            for context in (given.context, torch.zeros_like(given.context))
        ]
        velocity = velocity[1] + CONFIG.guidance * (velocity[0] - velocity[1])
        z = z + velocity * float(sigmas[step + 1] - sigmas[step])
    return z


def test_a_carried_rollout_equals_recomputing_everything_since_the_first_frame(model):
    given = conditions()
    so_far = given.history
    for number, chunk in enumerate(chunks(begin("carried", model, given), given, 4)):
        expected = recomputed(model, given, so_far, number)
        torch.testing.assert_close(chunk.latents, expected, atol=1e-5, rtol=1e-5)
        so_far = torch.cat([so_far, expected], dim=2)


def test_both_ways_agree_as_long_as_nothing_is_older_than_the_history(model):
    given = conditions()
    (one,), (other,) = (list(chunks(begin(way, model, given), given, 1)) for way in WAYS)
    torch.testing.assert_close(one.latents, other.latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.actions, other.actions, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_rollout_without_given_frames_begins_with_a_whole_window(model, way):
    given = conditions(history_frames=0)
    first, second = chunks(begin(way, model, given), given, 2)
    expected = sample(
        model,
        given,
        mode="joint",
        config=CONFIG,
        seeds=SEEDS,
        latent_shape=(FRAMES, *SIZE),
        horizon=ACTIONS,
    )
    assert torch.equal(first.latents, expected.latents)
    assert (first.latents.shape[2], second.latents.shape[2]) == (FRAMES, NEW)


@pytest.mark.parametrize("way", WAYS)
def test_actions_alone_equal_mode_joint_and_run_the_video_once_per_observation(model, way):
    given = conditions()
    history = begin(way, model, given)
    for number, joint in enumerate(chunks(history, given, 3)):
        passes = Counter()
        hooks = [
            stream.blocks[0].register_forward_hook(lambda *_, name=name, passes=passes: passes.update([name]))
            for name, stream in (("video", model.video_dit), ("action", model.action_dit))
        ]
        alone = history.sample(given, mode="action", seeds=seeds(number), size=SIZE)
        [hook.remove() for hook in hooks]
        assert (passes["video"], passes["action"]) == (1 if way == "sliding" else 0, CONFIG.steps)
        assert alone.latents is None
        torch.testing.assert_close(alone.actions, joint.actions, atol=1e-5, rtol=1e-5)


def work(run) -> int:
    """FLOPs of matrix products and attention."""
    # Attention as matrix products: the counter does not know the fused kernels of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def advance(history, given: Conditions, number: int) -> None:
    sampled = history.sample(given, mode="joint", seeds=seeds(number), size=SIZE)
    history.observe(sampled.latents, given)


@pytest.mark.parametrize("way", WAYS)
def test_no_chunk_of_many_takes_more_work_or_memory_than_another(model, way):
    given, flops, peaks = conditions(), {}, {}
    history = begin(way, model, given, SamplerConfig(steps=1, guidance=3.0))
    for number in range(24):
        run = partial(advance, history, given, number)
        if number in (4, 14, 23):  # before, a dilated window has to fill
            flops[number] = work(run)
        elif number in (5, 22):
            peaks[number] = peak_bytes(run)
        else:
            run()
    assert flops[4] > 1e6
    assert flops[4] == flops[14] == flops[23]
    assert peaks[22] == pytest.approx(peaks[5], rel=0.01)
    assert history.latents.untyped_storage().nbytes() == history.latents.nbytes == 2 * 16 * KEEP * 16 * 4


def test_growth_would_be_noticed():
    """The same measure where a carried history does grow: full attention in the video."""
    config = make_config(history_causal=True, layer_cycle=["FA", "GATED", "FA", "SWA", "GATED"])
    full = make_model(config).float().eval().requires_grad_(False)
    given = conditions()
    history = begin("carried", full, given, SamplerConfig(steps=1, guidance=1.0))
    early, later = (work(partial(advance, history, given, number)) for number in range(2))
    assert later > early


def test_seeds_of_chunks_differ_and_the_first_is_the_rollouts_own():
    drawn = [chunk_seed(seed, number) for seed in (0, 1) for number in range(50)]
    assert len(set(drawn)) == 100
    assert chunk_seed(7, 0) == 7


def test_requests_that_cannot_go_on_are_refused(model):
    for history, frames, match in (
        (0, 5, "history=0: a chunk of 5 latent frames goes on from 1 to 4"),
        (5, 5, "history=5: a chunk of 5 latent frames goes on from 1 to 4"),
        (2, 2, "history=2: a chunk of 2 latent frames goes on from 1 of them"),
        (1, 1, "history=1: this model's windows are of 1 latent frame"),
    ):
        with pytest.raises(UserError, match=match):
            SlidingHistory(model, CONFIG, ChunkSize(frames=frames, history=history))
    plain = make_model(make_config()).float().eval()
    with pytest.raises(UserError, match="history_causal=false"):
        StreamingHistory(plain, CONFIG, CHUNK)
    given = conditions(history_frames=0)
    for way in WAYS:
        with pytest.raises(UserError, match="at least one history frame"):
            begin(way, model, given).sample(given, mode="action", seeds=SEEDS, size=SIZE)
        with pytest.raises(UserError, match="one per sample"):
            begin(way, model, conditions()).sample(given, mode="joint", seeds=(1,), size=SIZE)
