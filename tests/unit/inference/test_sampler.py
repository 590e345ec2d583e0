"""The sampler: schedules, guidance, history, noise, and the agreement of its three modes. A tiny random model."""

import json

import pytest
import torch

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import ActionStreamConfig, ModelConfig, VideoStreamConfig
from kairos_train.inference import sampler
from kairos_train.inference.sampler import Conditions, SamplerConfig, sample
from kairos_train.model import WorldActionModel
from kairos_train.objective.schedule import video_shift

FRAMES, SIZE, HORIZON = 4, (4, 6), 8


def tiny_config(**video) -> ModelConfig:
    return ModelConfig(
        num_layers=4,
        num_heads=2,
        text_dim=24,
        freq_dim=16,
        video=VideoStreamConfig(dim=32, ffn_dim=48, dilation=2, gdn_key_dim=8, gdn_value_dim=16, **video),
        action=ActionStreamConfig(dim=16, ffn_dim=32, action_dim=3, state_dim=5),
    )


def build(config: ModelConfig) -> WorldActionModel:
    torch.manual_seed(0)
    model = WorldActionModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # heads and gates start at zero: every path must count here
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def model() -> WorldActionModel:
    return build(tiny_config())


def conditions(batch: int = 2, history_frames: int = 1, seed: int = 1) -> Conditions:
    g = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False
    history = torch.randn(batch, 16, history_frames, *SIZE, generator=g) if history_frames else None
    return Conditions(
        context=torch.randn(batch, 6, 24, generator=g),
        context_mask=mask,
        history=history,
        state=torch.randn(batch, 1, 5, generator=g),
    )


def run(model, mode, given=None, seeds=(3, 4), **settings):
    config = SamplerConfig(**{"steps": 4, "guidance": 1.0, **settings})
    given = given or conditions()
    latent_shape = (FRAMES, *SIZE)
    return sample(model, given, mode=mode, config=config, seeds=seeds, latent_shape=latent_shape, horizon=HORIZON)


def test_sigmas_are_the_reference_schedules_and_end_at_zero(shared):
    cases = json.loads((shared / "golden" / "flow_match.json").read_text())["cases"]
    checked = 0
    for case in cases:
        if "sigmas" not in case or "distilled_times" in case:
            continue
        config = SamplerConfig(steps=case["steps"])
        if case["stream"] == "video":
            sigmas = sampler.video_sigmas(config, case["latent_frames"], case["tokens_per_frame"])
        else:
            sigmas = sampler.action_sigmas(config)
        assert sigmas[-1] == 0
        torch.testing.assert_close(sigmas[:-1], torch.tensor(case["sigmas"], dtype=torch.float64), atol=1e-7, rtol=0)
        checked += 1
    assert checked >= 4


def test_distilled_schedule_is_the_four_shifted_times_on_both_streams():
    config = SamplerConfig(schedule="distilled", steps=4, guidance=1.0)
    expected = torch.tensor([1, 20 / 21, 5 / 6, 5 / 14, 0], dtype=torch.float64)
    torch.testing.assert_close(sampler.video_sigmas(config, 21, 1560), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(sampler.action_sigmas(config), expected, atol=1e-12, rtol=0)


def video_pass(model, given, z, t):
    """Velocity of the video with the first frame given, at timestep `t`."""
    times = torch.full((len(z),), t, dtype=torch.float32)
    return model(z, given.context, given.context_mask, times, [1] * len(z), state=given.state).video


@pytest.mark.parametrize("renoise", ["fresh", "same"])
def test_a_distilled_model_goes_to_the_clean_sample_and_is_noised_again(model, renoise):
    """The released sampler written out: σ(u) = 5u / (1 + 4u), and the last step leaves the model's own first frame."""
    given = conditions()
    sigma = [5 * u / (1 + 4 * u) for u in (1.0, 0.8, 0.5, 0.1)]
    first = sampler.noise((16, FRAMES, *SIZE), (3, 4), "video")
    z = torch.cat([given.history, first[:, :, 1:]], dim=2)
    for step, s in enumerate(sigma):
        clean = z - s * video_pass(model, given, z, s * 1000)
        if step == 3:
            break
        noise = first if renoise == "same" else sampler.noise((16, FRAMES, *SIZE), (3, 4), f"video:{step + 1}")
        z = (1 - sigma[step + 1]) * clean + sigma[step + 1] * noise
        z[:, :, :1] = given.history
    got = run(model, "video", given, schedule="distilled", renoise=renoise).latents
    torch.testing.assert_close(got, clean, atol=1e-5, rtol=0)
    assert not torch.equal(got[:, :, :1], given.history)


def test_fresh_noise_differs_from_step_to_step_and_belongs_to_the_sample(model):
    fresh, same = (run(model, "joint", schedule="distilled", renoise=name) for name in ("fresh", "same"))
    assert (fresh.latents - same.latents).abs().max() > 1e-2
    assert (fresh.actions - same.actions).abs().max() > 1e-2
    given = conditions()
    single = Conditions(*(t[1:] for t in (given.context, given.context_mask, given.history, given.state)))
    alone = run(model, "joint", single, seeds=(4,), schedule="distilled")
    torch.testing.assert_close(alone.latents, fresh.latents[1:], atol=1e-5, rtol=0)
    cached = run(model, "action", schedule="distilled").actions
    torch.testing.assert_close(cached, fresh.actions, atol=1e-5, rtol=0)


def test_timesteps_of_the_public_code_are_rounded_to_bfloat16(model):
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[3][0], kwargs)), with_kwargs=True)
    for dtype in ("float32", "bfloat16"):
        run(model, "joint", schedule="distilled", timestep_dtype=dtype)
    hook.remove()
    video = [float(t) for t, _ in seen]
    assert video[:4] == pytest.approx([1000, 20000 / 21, 2500 / 3, 2500 / 7], abs=1e-3)
    assert video[4:] == [1000, 952, 832, 358]
    assert [float(kwargs["action_timestep"][0]) for _, kwargs in seen] == video


def test_euler_along_the_true_velocity_of_one_clip_lands_on_it():
    clean, noise = torch.randn(2, 3), torch.randn(2, 3)
    sigmas = sampler.sampling_sigmas(7, 5.0)
    z = noise
    for step in range(7):
        z = sampler.euler(z, noise - clean, sigmas, step)
    torch.testing.assert_close(z, clean, atol=1e-5, rtol=0)


def test_sampling_integrates_the_velocity_over_its_own_schedule(model):
    given = conditions()
    ours = run(model, "joint", given)
    z = torch.cat([given.history, sampler.noise((16, FRAMES, *SIZE), (3, 4), "video")[:, :, 1:]], dim=2)
    a = sampler.noise((HORIZON, 3), (3, 4), "action")
    shift = video_shift(FRAMES, SIZE[0] * SIZE[1] // 4)

    def sigma(i, s):
        u = 1 - i / 4
        return s * u / (1 + (s - 1) * u)

    for i in range(4):
        v, va = sigma(i, shift), sigma(i, 5.0)
        out = model(
            z,
            given.context,
            given.context_mask,
            torch.tensor([v * 1000] * 2),
            [1, 1],
            state=given.state,
            action=a,
            action_timestep=torch.tensor([va * 1000] * 2),
        )
        z = z + out.video * (sigma(i + 1, shift) - v)
        z[:, :, :1] = given.history
        a = a + out.action * (sigma(i + 1, 5.0) - va)
    torch.testing.assert_close(ours.latents, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.actions, a, atol=1e-5, rtol=0)


def test_the_default_is_what_the_specification_says():
    assert SamplerConfig() == SamplerConfig("shifted", steps=10, guidance=5.0, action_shift=5.0, negative_prompt=None)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_velocities_of_bfloat16_weights_are_integrated_in_float32(guidance):
    rng = torch.Generator().manual_seed(0)
    velocities = [torch.randn(1, 2, 3, 2, 2, generator=rng).bfloat16() for _ in range(3)]
    video, negative, action = velocities[0], velocities[1], torch.randn(1, 4, 2, generator=rng).bfloat16()
    config, sigmas = SamplerConfig(steps=3, guidance=guidance), sampler.sampling_sigmas(3, 2.0)
    out = sampler.integrate(
        lambda z, t, a, t_action: (video, action),
        lambda z, t: negative,
        config=config,
        sigmas=sigmas,
        latents=sampler.StreamNoise((2, 3, 2, 2), [5], "video", torch.device("cpu")),
        actions=sampler.StreamNoise((4, 2), [5], "action", torch.device("cpu")),
        history=None,
    )
    v = video.float() if guidance == 1 else negative.float() + guidance * (video.float() - negative.float())
    torch.testing.assert_close(out.latents, sampler.noise((2, 3, 2, 2), [5], "video") - v, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(out.actions, sampler.noise((4, 2), [5], "action") - action.float(), atol=1e-6, rtol=1e-6)
    assert out.latents.dtype == out.actions.dtype == torch.float32


def test_the_model_is_told_timesteps_in_float32(model):
    told = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: told.append((args[3], kwargs)), with_kwargs=True)
    run(model, "joint", steps=3, guidance=2.0)
    hook.remove()
    video = 1000 * sampler.video_sigmas(SamplerConfig(steps=3), FRAMES, SIZE[0] * SIZE[1] // 4)[:-1]
    action = 1000 * sampler.action_sigmas(SamplerConfig(steps=3))[:-1]
    assert [float(t[0]) for t, _ in told[::2]] == video.float().tolist()
    assert [float(t[0]) for t, _ in told[1::2]] == video.float().tolist(), "of the negative branch"
    assert [float(kwargs["action_timestep"][0]) for _, kwargs in told[::2]] == action.float().tolist()
    assert all(t.dtype == torch.float32 for t, _ in told)


@pytest.mark.parametrize("history_frames", [0, 1, 2])
@pytest.mark.parametrize("mode", ["video", "joint"])
def test_history_frames_come_back_untouched(model, mode, history_frames):
    given = conditions(history_frames=history_frames)
    latents = run(model, mode, given, guidance=3.0).latents
    assert latents.shape == (2, 16, FRAMES, *SIZE)
    if history_frames:
        assert torch.equal(latents[:, :, :history_frames], given.history)


def test_history_is_put_back_before_every_step_not_only_at_the_end(model):
    given, seen = conditions(history_frames=2), []
    hook = model.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, :, :2].clone()))
    run(model, "video", given)
    hook.remove()
    assert len(seen) == 4
    assert all(torch.equal(latents, given.history) for latents in seen)


@pytest.mark.parametrize("history_frames", [1, 3])
def test_cached_actions_equal_joint_actions_whatever_the_guidance(model, history_frames):
    given = conditions(history_frames=history_frames)
    cached = run(model, "action", given).actions
    assert cached.shape == (2, HORIZON, 3)
    for guidance in (1.0, 4.0):
        torch.testing.assert_close(run(model, "joint", given, guidance=guidance).actions, cached, atol=1e-5, rtol=0)


def test_cached_actions_are_exact_where_every_frame_sees_all_history():
    wide = build(tiny_config(all_attend_history=True))
    given = conditions(history_frames=3)
    torch.testing.assert_close(run(wide, "joint", given).actions, run(wide, "action", given).actions, atol=1e-5, rtol=0)


def test_joint_video_equals_video_mode_with_and_without_guidance(model):
    for guidance in (1.0, 4.0):
        joint, alone = run(model, "joint", guidance=guidance), run(model, "video", guidance=guidance)
        torch.testing.assert_close(joint.latents, alone.latents, atol=1e-5, rtol=0)
        assert alone.actions is None


def test_guidance_leaves_the_null_form_and_moves_past_the_positive(model):
    given = conditions()
    null = Conditions(torch.zeros_like(given.context), given.context_mask, given.history, given.state)
    one_step = {"steps": 1}
    positive, negative = (run(model, "video", c, **one_step).latents for c in (given, null))
    assert (positive - negative).abs().max() > 1e-3
    torch.testing.assert_close(run(model, "video", given, guidance=0.0, **one_step).latents, negative)
    expected = negative + 3 * (positive - negative)
    got = run(model, "video", given, guidance=3.0, **one_step).latents
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_an_encoded_negative_prompt_takes_the_place_of_zeros(model):
    given, other = conditions(), conditions(seed=9)
    negative = (other.context[:, :3], torch.ones(2, 3, dtype=torch.bool))
    with_prompt = Conditions(given.context, given.context_mask, given.history, given.state, negative)
    as_positive = Conditions(*negative, given.history, given.state)
    got = run(model, "video", with_prompt, guidance=0.0).latents
    torch.testing.assert_close(got, run(model, "video", as_positive).latents, atol=1e-5, rtol=0)


def test_noise_belongs_to_the_sample_not_to_its_batch():
    both = sampler.noise((2, 3), [5, 6], "video")
    assert torch.equal(both[1:], sampler.noise((2, 3), [6], "video"))
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both, sampler.noise((2, 3), [5, 6], "action"))
    assert both.dtype == torch.float32
    assert both.device.type == "cpu"


def test_samples_do_not_depend_on_who_shares_the_batch(model):
    given = conditions()
    single = Conditions(*(t[1:] for t in (given.context, given.context_mask, given.history, given.state)))
    pair, alone = run(model, "joint", given), run(model, "joint", single, seeds=(4,))
    torch.testing.assert_close(alone.actions, pair.actions[1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(alone.latents, pair.latents[1:], atol=1e-5, rtol=0)


def test_bf16_weights_integrate_in_float32():
    model = build(tiny_config()).bfloat16()
    joint, cached = run(model, "joint"), run(model, "action")
    assert joint.latents.dtype == joint.actions.dtype == cached.actions.dtype == torch.float32
    assert joint.actions.isfinite().all()
    torch.testing.assert_close(joint.actions, cached.actions, atol=0.05, rtol=0)


def test_action_mode_is_refused_where_its_cache_would_not_be_exact():
    loose = build(tiny_config(restrict_history_query_to_history=False))
    with pytest.raises(UserError, match="restrict_history_query_to_history"):
        run(loose, "action")
    assert run(loose, "joint").actions.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"schedule": "ddim"}, "sampler.schedule='ddim'"),
        ({"steps": 0}, "sampler.steps=0"),
        ({"steps": 2.5}, "sampler.steps=2.5"),
        ({"schedule": "distilled", "steps": 10}, "sampler.steps=10"),
        ({"schedule": "distilled", "steps": 4, "action_shift": 3.0}, "sampler.action_shift=3.0"),
        ({"schedule": "distilled", "steps": 4, "guidance": 5.0}, "sampler.guidance=5.0"),
        ({"renoise": "again"}, "sampler.renoise='again'"),
        ({"timestep_dtype": "float16"}, "sampler.timestep_dtype='float16'"),
        ({"guidance": -1.0}, "sampler.guidance=-1.0"),
        ({"action_shift": 0.0}, "sampler.action_shift=0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        SamplerConfig(**settings).check()


def test_requests_that_make_no_sense_are_refused(model):
    config = SamplerConfig(steps=1)
    base = {"config": config, "seeds": (1, 2), "latent_shape": (FRAMES, *SIZE), "horizon": HORIZON}
    for changes, match in (
        ({"mode": "both"}, "mode='both'"),
        ({"mode": "joint", "seeds": (1,)}, "one per sample"),
        ({"mode": "joint", "horizon": None}, "horizon"),
        ({"mode": "video", "latent_shape": None}, "latent_shape"),
        ({"mode": "video", "latent_shape": (1, *SIZE)}, "nothing to sample"),
    ):
        with pytest.raises(UserError, match=match):
            sample(model, conditions(), **{**base, **changes})
    with pytest.raises(UserError, match="at least one history frame"):
        run(model, "action", conditions(history_frames=0))
