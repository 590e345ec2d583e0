"""The world-action model: reference vectors, modes, masks, batches, sizes."""

import json

import pytest
import torch
from support.model_factory import make_config, make_inputs, make_model

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import ActionStreamConfig, Config, KernelsConfig, ModelConfig, VideoStreamConfig
from kairos_train.model import WorldActionModel, golden
from kairos_train.model.hooks import ModelHooks, SingleDevice
from kairos_train.model.kernels.windows import WindowSpec, frames_read
from kairos_train.model.passes import ActionPass
from kairos_train.model.public_keys import public_keys
from kairos_train.model.summary import check_keys, meta_model, numbers, parameter_counts, table

GOLDEN = [
    "action_with_video_cache",
    "joint_all_attend_history",
    "joint_frame_window",
    "joint_two_cycles_history3",
    "video_frame_window",
    "video_token_window",
    "video_token_window_divides",
]


def small_config(**video) -> ModelConfig:
    return ModelConfig(
        name="test",
        num_layers=4,
        num_heads=2,
        text_dim=12,
        freq_dim=16,
        video=VideoStreamConfig(dim=24, ffn_dim=32, gdn_key_dim=6, gdn_value_dim=8, dilation=2, **video),
        action=ActionStreamConfig(dim=16, ffn_dim=24, action_dim=3, state_dim=5),
    )


@pytest.fixture(scope="module")
def model() -> WorldActionModel:
    torch.manual_seed(0)
    model = WorldActionModel(small_config()).double()
    for head in (model.video_dit.head.head, model.action_dit.head):
        torch.nn.init.normal_(head.weight)  # heads start at zero, which would hide everything
    return model


def inputs(batch=2, frames=5, actions=6, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.ones(batch, 4, dtype=torch.bool)
    mask[0, 3] = False
    return {
        "latents": draw(batch, 16, frames, 4, 6),
        "context": draw(batch, 4, 12),
        "context_mask": mask,
        "video_timestep": torch.tensor([900.0, 300.0][:batch]),
        "history_frames": [1, 2][:batch],
        "state": draw(batch, 1, 5),
        "action": draw(batch, actions, 3),
        "action_timestep": torch.tensor([100.0, 700.0][:batch]),
    }


def sample(batch: dict, i: int) -> dict:
    return {k: v[i : i + 1] for k, v in batch.items()}


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("backend", ["gathered", "dense"])
def test_reference_vectors_are_met(shared, name, backend):
    path = shared / "golden" / f"{name}.safetensors"
    result = golden.verify_file(path, device="cpu", dtype=torch.float32, kernels=KernelsConfig(attention=backend))
    assert result.outputs <= 1e-5, result
    assert result.gradients <= 1e-4, result


def test_a_file_of_other_tensors_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="no reference vectors"):
        golden.verify_files([tmp_path / "x.safetensors"])
    (tmp_path / "y.safetensors").write_text("no tensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        golden.verify_files([tmp_path / "y.safetensors"])


def test_each_sample_of_a_batch_is_as_if_alone(model):
    batch = inputs()
    together = model(**batch)
    for i in range(2):
        alone = model(**sample(batch, i))
        torch.testing.assert_close(alone.video, together.video[i : i + 1], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(alone.action, together.action[i : i + 1], atol=1e-12, rtol=1e-10)


def test_video_mode_equals_joint_mode_with_the_same_context(model):
    batch = inputs()
    joint = model(**batch)
    video = model(**{**batch, "action": None, "action_timestep": None})
    torch.testing.assert_close(video.video, joint.video)
    assert video.action.shape == (1, 1, 3), "in training: a dummy, for the loss to add as zero"


def test_action_with_cache_equals_joint_mode(model):
    batch = inputs()
    batch["history_frames"] = [2, 2]
    joint = model(**batch)
    text = {"context": batch["context"], "context_mask": batch["context_mask"], "state": batch["state"]}
    cache = model.encode_history(batch["latents"][:, :, :2], **text)
    action = model.forward_action(cache, batch["action"], batch["action_timestep"], **text)
    torch.testing.assert_close(action, joint.action, atol=1e-12, rtol=1e-10)
    encoded = model.encode_action_context(**text)
    again = model.forward_action(cache, batch["action"], batch["action_timestep"], encoded)
    torch.testing.assert_close(again, joint.action, atol=1e-12, rtol=1e-10)


def test_actions_do_not_see_the_noise_but_see_the_history(model):
    batch = inputs(batch=1)
    reference = model(**batch).action
    noisy, history = batch["latents"].clone(), batch["latents"].clone()
    noisy[:, :, 1:] += 1
    history[:, :, :1] += 1
    torch.testing.assert_close(model(**{**batch, "latents": noisy}).action, reference)
    assert (model(**{**batch, "latents": history}).action - reference).abs().max() > 1e-6


@pytest.mark.parametrize(
    "video", [{"restrict_history_query_to_history": False}, {"window_semantics": "token"}], ids=str
)
def test_a_cache_is_refused_where_history_depends_on_the_noise(video):
    model = WorldActionModel(small_config(**video))
    with pytest.raises(UserError, match="restrict_history_query_to_history"):
        model.encode_history(torch.zeros(1, 16, 1, 4, 4), torch.zeros(1, 2, 12), None)


def test_padded_actions_and_padded_context_change_nothing(model):
    batch = inputs()
    short = {**batch, "action": batch["action"][:, :4]}
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    padded = model(**batch, action_mask=mask)
    torch.testing.assert_close(padded.action[:, :4], model(**short).action, atol=1e-12, rtol=1e-10)
    changed = batch["context"].clone()
    changed[0, 3] += 5
    torch.testing.assert_close(model(**{**batch, "context": changed}).video[0], padded.video[0])


def test_the_state_is_one_more_token_that_both_streams_see_behind_the_text(model):
    batch = inputs()
    reference, moved = model(**batch), model(**{**batch, "state": batch["state"] + 1})
    assert (moved.video - reference.video).abs().amax((1, 2, 3, 4)).min() > 1e-6, "of either sample, masked text or not"
    assert (moved.action - reference.action).abs().amax((1, 2)).min() > 1e-6
    context, mask = model.with_state(batch["context"], batch["context_mask"], batch["state"])
    assert torch.equal(context[:, :-1], batch["context"])
    assert torch.equal(context[:, -1:], model.action_dit.proprio_encoder(batch["state"]))
    assert torch.equal(mask[:, :-1], batch["context_mask"])
    assert mask[:, -1].all()


def test_a_sample_without_any_valid_action_stays_finite(model):
    mask = torch.tensor([[False] * 6, [True] * 6])
    actions = ActionPass(
        model.action_dit, torch.zeros(2, 6, 3), torch.zeros(2), torch.zeros(2, 4, 12).double(), None, mask
    )
    assert actions.mask.all(), "attention without a key is NaN on some devices, zero on others"
    out = model(**inputs(), action_mask=mask)
    out.action[1].sum().backward()
    assert torch.isfinite(out.action).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_history_frames_have_timestep_zero(model):
    batch = inputs(batch=1)
    batch["history_frames"] = [5]
    a = model(**batch).video
    b = model(**{**batch, "video_timestep": torch.tensor([123.0])}).video
    torch.testing.assert_close(a, b)


def test_bfloat16_runs_and_stays_near_float32():
    torch.manual_seed(0)
    model = WorldActionModel(small_config())
    torch.nn.init.normal_(model.video_dit.head.head.weight)
    torch.nn.init.normal_(model.action_dit.head.weight)
    batch = {k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs().items()}
    with torch.no_grad():
        full = model(**batch)
        half = model.bfloat16()(**batch)
    assert half.video.dtype == torch.bfloat16
    for a, b in zip(half, full, strict=True):
        assert (a - b).pow(2).mean().sqrt() / b.pow(2).mean().sqrt() < 2e-2


def test_wrong_input_is_named(model):
    batch = inputs()
    with pytest.raises(UserError, match="history_frames"):
        model(**{**batch, "history_frames": [1, 9]})
    with pytest.raises(UserError, match="do not divide into patches"):
        model(**{**batch, "latents": batch["latents"][..., :5]})
    video_only = WorldActionModel(ModelConfig(**{**small_config().__dict__, "action": None})).double()
    with pytest.raises(UserError, match="without an action stream"):
        video_only(**batch)


def test_full_size_has_the_published_parameters_and_keys(shared):
    model = meta_model(ModelConfig())
    assert parameter_counts(model) == {"video_dit": 4_046_680_960, "action_dit": 955_849_742}
    expected = json.loads((shared / "spec" / "full_size_keys.json").read_text())
    assert public_keys(ModelConfig()) == {k: tuple(v) for k, v in expected.items()}
    assert check_keys(model, public_keys(ModelConfig())) == 1785


def test_summary_prints_counts_and_a_renamed_key_is_caught():
    text = table(numbers(Config()))
    assert "4.047 B" in text
    assert "0.956 B" in text
    assert "1,785 checkpoint keys" in text
    keys = public_keys(ModelConfig())
    keys["video_dit.blocks.0.self_attn.query.weight"] = keys.pop("video_dit.blocks.0.self_attn.q.weight")
    with pytest.raises(UserError, match=r"blocks\.0\.self_attn\.q\.weight"):
        check_keys(meta_model(ModelConfig()), keys)


class Asked(SingleDevice):
    """Writes down which exchanges its layers ask for."""

    def __init__(self):
        self.exchanges = []

    def exchange_frames(self, frames, reads, on_all_ranks, *, period, hidden, kv):
        self.exchanges.append((frames, reads, on_all_ranks, period, hidden, kv))
        return super().exchange_frames(frames, reads, on_all_ranks, period=period, hidden=hidden, kv=kv)


def test_every_rank_is_sent_the_history_that_actions_read_and_nothing_else():
    config, hooks = make_config(), Asked()
    model = make_model(config, hooks=ModelHooks(video=hooks, action=SingleDevice()))
    for given, shared in (({}, (0, 1)), ({"actions": False}, ()), ({"history": (0, 0)}, ())):
        hooks.exchanges.clear()
        model(**make_inputs(**given))
        history = given.get("history", (1, 2))
        for exchange, kind, period in zip(hooks.exchanges, ("SWA", "DSWA", "FA"), (1, 2, 1), strict=True):
            reads = frames_read(WindowSpec.of(kind, config.video), 5, history)
            assert exchange == (5, reads, shared, period, 4 * 24, 2 * 4 * 24), kind


@pytest.mark.parametrize("without", [("state",), ("action", "action_timestep", "action_mask"), ()])
def test_parameters_that_a_batch_leaves_unused_still_take_part(without):
    """As they must on ranks without actions while other ranks have some; the video does not change by a bit."""
    model = make_model()
    given = {name: value for name, value in make_inputs().items() if name not in without}
    video, action = model(**given)
    (video.pow(2).sum() + (1.0 if "action" in given else 0.0) * action.pow(2).sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    unused = {name.split(".")[1] for name, p in model.named_parameters() if not p.grad.any() and "action_dit" in name}
    assert ("proprio_encoder" in unused) == ("state" in without)
    assert ("action_encoder" in unused) == ("action" in without)
    model.eval()
    output = model(**given)
    torch.testing.assert_close(output.video, video, rtol=0, atol=0)
    assert (output.action is None) == ("action" in without)


@pytest.mark.parametrize("batch", [{"actions": False}, {"frames": 1, "history": (0, 0)}, {"history": (0, 3)}], ids=str)
def test_gradients_come_in_one_order_whatever_a_batch_holds(batch):
    """ZeRO packs gradients into buckets as they come, and adds up buckets of ranks that hold different batches."""
    assert arrivals(batch) == arrivals({})


def arrivals(batch: dict) -> list[str]:
    """Names of the parameters in the order of their gradients."""
    model, names = make_model(), []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda gradient, name=name: names.append(name))
    video, action = model(**make_inputs(**batch))
    (video.pow(2).sum() + (1.0 if batch.get("actions", True) else 0.0) * action.pow(2).sum()).backward()
    return names
