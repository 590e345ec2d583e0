"""Where weights come from: other checkpoints, interpolation, a seed."""

import numpy as np
import pytest
import torch
from support.tiny_export import tiny_config

from kairos_train.basics.errors import UserError
from kairos_train.checkpoint.canonical import CheckpointReader
from kairos_train.checkpoint.resolve import resolve_checkpoint
from kairos_train.checkpoint.writing import write_checkpoint
from kairos_train.model import WorldActionModel
from kairos_train.training.engine.initial_weights import (
    InitialWeights,
    build_model,
    initial_average,
    interpolate,
    load_initial,
)


@pytest.fixture
def model() -> WorldActionModel:
    torch.manual_seed(1)
    return WorldActionModel(tiny_config().model)


def checkpoint(parent, model, *, action: bool = True, step: int = 3, encoders: dict | None = None):
    state = {k: v + 1 for k, v in model.state_dict().items() if action or k.startswith("video_dit.")}
    ema = {k: v + 1 for k, v in state.items()}
    return write_checkpoint(parent, step, sections={"model": state, "ema": ema}, state={"encoders": encoders}, files={})


def test_fresh_weights_depend_on_the_seed_alone():
    config = tiny_config()
    a, b = build_model(config).state_dict(), build_model(config).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    config.seed += 1
    assert any(not torch.equal(a[k], v) for k, v in build_model(config).state_dict().items())


@pytest.mark.parametrize(("weights", "added"), [("raw", 1), ("ema", 2)])
def test_raw_or_averaged_weights_are_taken_whole(model, tmp_path, weights, added):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reader = CheckpointReader(checkpoint(tmp_path, model))
    load_initial(model, InitialWeights(reader, {"raw": "model", "ema": "ema"}[weights], action_init="random"))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name] + added)


def test_a_run_folder_means_its_newest_checkpoint(model, tmp_path):
    checkpoint(tmp_path / "checkpoints", model, step=3)
    newest = checkpoint(tmp_path / "checkpoints", model, step=11)
    assert resolve_checkpoint(tmp_path) == newest == resolve_checkpoint(newest)
    with pytest.raises(UserError, match="no checkpoint there"):
        resolve_checkpoint(tmp_path / "elsewhere")


def test_a_video_checkpoint_gives_the_video_and_interpolates_or_leaves_the_action_stream(model, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reader = CheckpointReader(checkpoint(tmp_path, model, action=False))
    load_initial(model, InitialWeights(reader, "model", action_init="random"))
    after = model.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in after if k.startswith("action_dit."))
    assert all(torch.equal(after[k], before[k] + 1) for k in after if k.startswith("video_dit."))
    load_initial(model, InitialWeights(reader, "model", action_init="interpolate"))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    kept = {k for k in before if k.startswith(("action_dit.action_encoder", "action_dit.proprio", "action_dit.head"))}
    assert kept.isdisjoint(changed)
    assert "action_dit.blocks.3.ffn.0.weight" in changed


def test_interpolation_keeps_end_points_and_takes_attention_from_before_a_gated_layer(model, tmp_path):
    for name, value in model.video_dit.state_dict().items():
        if value.ndim == 2 and "self_attn.q" in name:
            layer = int(name.split(".")[1])
            value.copy_(torch.linspace(0, 1, value.shape[1]).expand_as(value) + layer)
    video = {k: v for k, v in model.state_dict().items() if k.startswith("video_dit.")}
    path = write_checkpoint(tmp_path, 1, sections={"model": video}, state={}, files={})
    load_initial(model, InitialWeights(CheckpointReader(path), "model", action_init="interpolate"))
    action = model.action_dit
    width = action.blocks[0].self_attn.q.weight.shape[1]
    expected = torch.linspace(0, 1, width).expand(action.blocks[0].self_attn.q.weight.shape[0], -1)
    torch.testing.assert_close(action.blocks[1].self_attn.q.weight, expected + 1, atol=1e-5, rtol=0)
    torch.testing.assert_close(action.blocks[3].self_attn.q.weight, expected + 2, atol=1e-5, rtol=0)


def test_what_is_not_self_attention_is_taken_from_its_own_layer(model, tmp_path):
    """A GATED layer has all but self-attention."""
    for layer, block in enumerate(model.video_dit.blocks):
        for parameter in (block.cross_attn.q.weight, block.ffn[0].weight, block.modulation):
            parameter.data.fill_(float(layer))
    video = {k: v for k, v in model.state_dict().items() if k.startswith("video_dit.")}
    path = write_checkpoint(tmp_path, 1, sections={"model": video}, state={}, files={})
    load_initial(model, InitialWeights(CheckpointReader(path), "model", action_init="interpolate"))
    for layer, block in enumerate(model.action_dit.blocks):
        for parameter in (block.cross_attn.q.weight, block.ffn[0].weight, block.modulation):
            assert torch.equal(parameter, torch.full_like(parameter, layer))


def line(source: np.ndarray, size: int) -> np.ndarray:
    """`source` (n,) at `size` evenly spaced places, the first and the last one included."""
    return np.interp(np.linspace(0, len(source) - 1, size), np.arange(len(source)), source)


def test_a_tensor_is_interpolated_linearly_along_each_of_its_dimensions():
    source = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double()
    rows = np.stack([line(column, 4) for column in source.numpy().T], axis=1)
    expected = np.stack([line(row, 3) for row in rows])
    found = interpolate("blocks.0.ffn.0.weight", source, torch.Size((4, 3)))
    torch.testing.assert_close(found, torch.from_numpy(expected))
    assert torch.equal(interpolate("blocks.0.ffn.0.weight", source, torch.Size((7, 5))), source)


@pytest.mark.parametrize("columns", [None, 8])
def test_each_of_the_six_outputs_of_the_time_projection_is_interpolated_by_itself(columns):
    """Of no two of them is anything mixed: their end points meet and stay apart."""
    shape = (6 * 8,) if columns is None else (6 * 8, columns)
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    name = "time_projection.1.bias" if columns is None else "time_projection.1.weight"
    found = interpolate(name, source, torch.Size((6 * 5, *shape[1:])))
    for part in range(6):
        mine, theirs = found[5 * part : 5 * (part + 1)], source[8 * part : 8 * (part + 1)]
        flat = theirs.reshape(8, -1).numpy()
        expected = np.stack([line(column, 5) for column in flat.T], axis=1).reshape(mine.shape)
        torch.testing.assert_close(mine, torch.from_numpy(expected))
        assert torch.equal(mine[[0, -1]], theirs[[0, -1]])


def test_an_action_stream_starts_from_interpolated_time_projections(model, tmp_path):
    video = {k: v for k, v in model.state_dict().items() if k.startswith("video_dit.")}
    path = write_checkpoint(tmp_path, 1, sections={"model": video}, state={}, files={})
    load_initial(model, InitialWeights(CheckpointReader(path), "model", action_init="interpolate"))
    for last in ("weight", "bias"):
        name = f"time_projection.1.{last}"
        mine, theirs = model.action_dit.get_parameter(name), model.video_dit.get_parameter(name)
        assert torch.equal(mine, interpolate(name, theirs, mine.shape))


def test_weights_of_another_size_are_refused_by_name(model, tmp_path):
    reader = CheckpointReader(checkpoint(tmp_path, model))
    config = tiny_config()
    config.model.video.ffn_dim *= 2
    with pytest.raises(UserError, match=r"ffn\.0\.weight is .* there"):
        load_initial(WorldActionModel(config.model), InitialWeights(reader, "model", action_init="random"))
    config = tiny_config()
    config.stage.init_from = str(
        write_checkpoint(tmp_path, 9, sections={"model": model.state_dict()}, state={}, files={})
    )
    with pytest.raises(UserError, match=r"use stage\.init_weights=raw"):
        build_model(config)


def test_weights_and_their_average_are_handed_over_each_to_its_own(model, tmp_path):
    config = tiny_config()
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert initial_average(config, shapes) is None
    config.stage.init_from = str(checkpoint(tmp_path, model, action=False))
    assert initial_average(config, shapes) is None  # ema: both start from the average
    config.stage.init_weights = "both"
    weights, average = dict(build_model(config).named_parameters()), initial_average(config, shapes).read
    name = "video_dit.blocks.0.ffn.0.weight"
    torch.testing.assert_close(average(name, ()), weights[name] + 1)
    torch.testing.assert_close(average(name, (slice(1, 3),)), (weights[name] + 1)[1:3])
    interpolated = "action_dit.blocks.0.ffn.0.weight"
    torch.testing.assert_close(average(interpolated, ()), weights[interpolated] + 1)  # linear in the source
    fresh = "action_dit.head.weight"
    torch.testing.assert_close(average(fresh, ()), weights[fresh])


def test_a_frozen_video_stream_does_not_require_gradients_and_a_video_stage_has_no_actions():
    config = tiny_config()
    config.stage.train_video = False
    model = build_model(config)
    assert not any(p.requires_grad for p in model.video_dit.parameters())
    assert all(p.requires_grad for p in model.action_dit.parameters())
    config.stage.streams, config.stage.train_video = "video", True
    assert build_model(config).action_dit is None


def test_weights_trained_with_other_encoders_are_refused(model, tmp_path):
    own, other = ({"video": {"kind": kind}, "text": {"kind": "t"}} for kind in ("block_dct", "wan"))
    config = tiny_config()
    config.stage.init_from = str(checkpoint(tmp_path, model, encoders=other))
    build_model(config, other)
    with pytest.raises(UserError, match=r"encoders\.video\.kind: made with 'wan'"):
        build_model(config, own)
