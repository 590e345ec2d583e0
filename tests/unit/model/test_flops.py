"""The stated FLOP formula against torch's own counter, which sees every matrix product and attention call."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kairos_train.config.schema import ActionStreamConfig, ModelConfig, VideoStreamConfig
from kairos_train.model import WorldActionModel
from kairos_train.model.flops import action_context_flops, forward_flops, training_flops


def counted(config: ModelConfig, *, frames: int, actions: int, history: int) -> int:
    torch.manual_seed(0)
    model = WorldActionModel(config)
    acting = {}
    if actions:
        acting = {
            "state": torch.zeros(1, 1, 5),
            "action": torch.zeros(1, actions, 3),
            "action_timestep": torch.tensor([500.0]),
        }
    # The math backend: the counter does not know the fused CPU kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 16, frames, 8, 8), torch.zeros(1, 6, 24), None, torch.tensor([500.0]), [history], **acting)
    return counter.get_total_flops()


@pytest.mark.parametrize("cycle", [["FA"], ["SWA", "DSWA"], ["SWA", "GATED"]])
@pytest.mark.parametrize(("actions", "history"), [(0, 0), (0, 2), (8, 1)])
def test_the_formula_counts_what_torch_counts(cycle, actions, history):
    config = ModelConfig(
        num_layers=2 * len(cycle),
        num_heads=2,
        text_dim=24,
        freq_dim=16,
        video=VideoStreamConfig(dim=64, ffn_dim=96, dilation=2, gdn_key_dim=16, gdn_value_dim=32, layer_cycle=cycle),
        action=ActionStreamConfig(dim=32, ffn_dim=48, action_dim=3, state_dim=5) if actions else None,
    )
    ours = forward_flops(config, 9, 16, 6, actions=actions, history=history)
    theirs = counted(config, frames=9, actions=actions, history=history)
    # Of a Gated DeltaNet layer torch counts neither the convolutions (elementwise products) nor the triangular solve.
    tolerance = 0.06 if "GATED" in cycle else 0.005
    assert ours == pytest.approx(theirs, rel=tolerance)


def test_the_context_that_actions_keep_is_counted():
    config = ModelConfig(
        num_layers=2,
        num_heads=2,
        text_dim=24,
        freq_dim=16,
        video=VideoStreamConfig(dim=64, ffn_dim=96, layer_cycle=["FA"]),
        action=ActionStreamConfig(dim=32, ffn_dim=48, action_dim=3, state_dim=5),
    )
    model = WorldActionModel(config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_action_context(torch.zeros(1, 6, 24), None, state=torch.zeros(1, 1, 5))
    assert action_context_flops(config, 6) == counter.get_total_flops()


def test_training_is_three_forward_passes():
    assert training_flops(ModelConfig(), 3, 64, 16) == 3 * forward_flops(ModelConfig(), 3, 64, 16)
