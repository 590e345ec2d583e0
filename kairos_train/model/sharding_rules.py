"""Sharding rules of the world-action model: which parameters tensor ranks split, which replicas see part of the data.

Heads and FFN channels are split. All other parameters are replicated, and their gradients are complete on each rank as
long as their inputs, and the consumers of their outputs, are whole. Two things make a gradient partial:

- All heads share the output norm of a Gated DeltaNet layer, and a rank applies it to its own heads. The replicated
  factor of an adapter, A of a column layer and B of a row layer, meets the local features only.
- Under sequence parallelism the video's residual stream holds the local tokens between `split_tokens` and
  `join_tokens`: modulations and the timestep MLPs behind them, norms, biases of row layers, the head. Patch and text
  embeddings come before that or go around it, and no layout splits the action stream by tokens.
"""

from collections.abc import Iterable

from parallel.sharding import ShardingRule, ShardingTable

_LINEAR = r"(weight|bias)"
_BLOCK = r"(video|action)_dit\.blocks\.\d+"
_VIDEO_BLOCK = r"video_dit\.blocks\.\d+"
_ACTION_BLOCK = r"action_dit\.blocks\.\d+"
_GDN = rf"{_VIDEO_BLOCK}\.gated_delta"
_ATTENTION = r"(self_attn|cross_attn)"
_WHOLE_IN_BLOCK = rf"(modulation|cross_attn_norm\.{_LINEAR}|{_ATTENTION}\.o\.bias|ffn\.2\.bias)"
_COLUMN = rf"({_BLOCK}\.({_ATTENTION}\.[qkv]|ffn\.0)|{_GDN}\.[qkvabg]_proj)"
_ROW = rf"({_BLOCK}\.({_ATTENTION}\.o|ffn\.2)|{_GDN}\.o_proj)"

SPLIT = (
    ShardingRule(rf"{_COLUMN}\.{_LINEAR}", "column"),
    ShardingRule(rf"{_COLUMN}\.lora_b", "column"),
    ShardingRule(rf"{_ROW}\.weight", "row"),
    ShardingRule(rf"{_ROW}\.lora_a", "row"),
    ShardingRule(rf"{_BLOCK}\.{_ATTENTION}\.norm_[qk]\.weight", "head"),
    ShardingRule(rf"{_GDN}\.[qkv]_conv1d\.weight", "head"),
    ShardingRule(rf"{_GDN}\.(A_log|dt_bias)", "head"),
)
"""Split over tensor ranks in both streams."""

WHOLE = (
    ShardingRule(rf"video_dit\.patch_embedding\.{_LINEAR}", "replicated_full"),
    ShardingRule(rf"(video|action)_dit\.text_embedding\.[02]\.{_LINEAR}", "replicated_full"),
    ShardingRule(rf"action_dit\.(action_encoder|proprio_encoder\.[02]|head)\.{_LINEAR}", "replicated_full"),
    ShardingRule(rf"action_dit\.(time_embedding\.[02]|time_projection\.1)\.{_LINEAR}", "replicated_full"),
    ShardingRule(rf"{_ACTION_BLOCK}\.{_WHOLE_IN_BLOCK}", "replicated_full"),
)
"""On every rank with complete gradients, in any layout."""

OF_SOME_FEATURES = (
    ShardingRule(rf"{_GDN}\.o_norm\.weight", "replicated_partial"),
    ShardingRule(rf"{_COLUMN}\.lora_a", "replicated_partial"),
    ShardingRule(rf"{_ROW}\.lora_b", "replicated_partial"),
)
"""On every rank, with gradients of the local heads or features alone, in any layout."""

BETWEEN_LAYERS = (
    rf"video_dit\.(time_embedding\.[02]|time_projection\.1)\.{_LINEAR}",
    rf"video_dit\.head\.(modulation|head\.{_LINEAR})",
    rf"{_VIDEO_BLOCK}\.{_WHOLE_IN_BLOCK}",
)
"""Of the video stream: on every rank, applied to the local tokens under sequence parallelism, else to all."""


def sharding_table(*, tensor: int, sequence: bool, names: Iterable[str]) -> ShardingTable:
    """The table of a model of `tensor` ranks.

    Args:
        tensor: `parallel.tensor`.
        sequence: `parallel.sequence`.
        names: of all parameters, as `named_parameters` gives them.

    Raises:
        ShardingError: a parameter that no rule fits, or more than one.
    """
    between = "replicated_partial" if sequence else "replicated_full"
    rules = (
        *SPLIT,
        *WHOLE,
        *OF_SOME_FEATURES,
        *(ShardingRule(pattern, between) for pattern in BETWEEN_LAYERS),
    )
    return ShardingTable.of(rules, names, tensor=tensor)
