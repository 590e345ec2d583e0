"""Which parameters of the world-action model tensor ranks split, and which copies see only a part of the data.

Heads and FFN channels are split. What is left is on every rank, and its gradient is complete there when its input and
what is done with its output are whole. Two things make them partial:

- The output norm of GATED layers is shared by all heads and applied to this rank's. The factor of an adapter that is on
  every rank, A of a column layer and B of a row layer, meets this rank's features only.
- Under sequence parallelism the video's residual stream is this rank's tokens between `split_tokens` and `join_tokens`:
  modulations and what makes them (the timestep MLPs), norms, biases of row layers, the head. Patch and text embeddings
  come before that or go around it, and the action stream is never split by tokens.
"""

from collections.abc import Iterable

from parallel.sharding import Rule, ShardingTable

_LINEAR = r"(weight|bias)"
_BLOCK = r"(video|action)_dit\.blocks\.\d+"
_VIDEO_BLOCK = r"video_dit\.blocks\.\d+"
_ACTION_BLOCK = r"action_dit\.blocks\.\d+"
_GATED = rf"{_VIDEO_BLOCK}\.gated_delta"
_ATTENTION = r"(self_attn|cross_attn)"
_WHOLE_IN_BLOCK = rf"(modulation|cross_attn_norm\.{_LINEAR}|{_ATTENTION}\.o\.bias|ffn\.2\.bias)"
_COLUMN = rf"({_BLOCK}\.({_ATTENTION}\.[qkv]|ffn\.0)|{_GATED}\.[qkvabg]_proj)"
_ROW = rf"({_BLOCK}\.({_ATTENTION}\.o|ffn\.2)|{_GATED}\.o_proj)"

SPLIT = (
    Rule(rf"{_COLUMN}\.{_LINEAR}", "column"),
    Rule(rf"{_COLUMN}\.lora_b", "column"),
    Rule(rf"{_ROW}\.weight", "row"),
    Rule(rf"{_ROW}\.lora_a", "row"),
    Rule(rf"{_BLOCK}\.{_ATTENTION}\.norm_[qk]\.weight", "head"),
    Rule(rf"{_GATED}\.[qkv]_conv1d\.weight", "head"),
    Rule(rf"{_GATED}\.(A_log|dt_bias)", "head"),
)
"""Split over tensor ranks in both streams."""

WHOLE = (
    Rule(rf"video_dit\.patch_embedding\.{_LINEAR}", "replicated_full"),
    Rule(rf"(video|action)_dit\.text_embedding\.[02]\.{_LINEAR}", "replicated_full"),
    Rule(rf"action_dit\.(action_encoder|proprio_encoder\.[02]|head)\.{_LINEAR}", "replicated_full"),
    Rule(rf"action_dit\.(time_embedding\.[02]|time_projection\.1)\.{_LINEAR}", "replicated_full"),
    Rule(rf"{_ACTION_BLOCK}\.{_WHOLE_IN_BLOCK}", "replicated_full"),
)
"""On every rank with their whole gradients, in any layout."""

OF_SOME_FEATURES = (
    Rule(rf"{_GATED}\.o_norm\.weight", "replicated_partial"),
    Rule(rf"{_COLUMN}\.lora_a", "replicated_partial"),
    Rule(rf"{_ROW}\.lora_b", "replicated_partial"),
)
"""On every rank, with gradients of what that rank computes with them, in any layout."""

BETWEEN_LAYERS = (
    rf"video_dit\.(time_embedding\.[02]|time_projection\.1)\.{_LINEAR}",
    rf"video_dit\.head\.(modulation|head\.{_LINEAR})",
    rf"{_VIDEO_BLOCK}\.{_WHOLE_IN_BLOCK}",
)
"""Of the video stream: on every rank, applied to this rank's tokens under sequence parallelism and to all else."""


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
        *(Rule(pattern, between) for pattern in BETWEEN_LAYERS),
    )
    return ShardingTable.of(rules, names, tensor=tensor)
