"""Model FLOPs from the configuration: the stated formula behind FLOPs per second and MFU.

One multiply-add counts as 2. Per token and layer, forward:
    projections          2·D·(widths in and out)
    windows              4·(attention width)·(keys the token reads)
    Gated DeltaNet       projections, convolutions and the chunked recurrence, see `_gdn_flops`
    cross-attention      projections of the query side, keys and values once per context token, 4·width·N
    FFN                  4·D·FFN
Backward costs twice the forward; recomputed activations do not count (model FLOPs, not hardware FLOPs). Embeddings and
heads count as matrix products; norms and other elementwise work do not count.
"""

from kairos_train.config.schema import ModelConfig
from kairos_train.model.kernels.delta_rule import CHUNK
from kairos_train.model.kernels.windows import WindowSpec, key_frames
from kairos_train.model.streams import layer_kinds


def forward_flops(
    config: ModelConfig, frames: int, tokens_per_frame: int, context_tokens: int, *, actions: int = 0, history: int = 0
) -> float:
    """FLOPs of one sample's forward pass.

    Args:
        frames: F latent frames.
        tokens_per_frame: L after patchifying.
        context_tokens: N text tokens, the state token not counted.
        actions: A action tokens; 0 runs the video stream alone.
        history: K history frames.
    """
    state = 1 if actions else 0
    flops = _video_flops(config, frames, tokens_per_frame, context_tokens + state, history)
    if actions:
        flops += _action_flops(config, actions, context_tokens + state, history * tokens_per_frame)
    return float(flops)


def action_context_flops(config: ModelConfig, context_tokens: int) -> float:
    """FLOPs of `WorldActionModel.encode_action_context`: the part of a pass of the action stream that stays the same
    from one denoising step to the next. N text tokens, the state token not counted."""
    action, tokens = config.action, context_tokens + 1
    embedding = 2 * tokens * (config.text_dim * action.dim + action.dim**2)
    state = 2 * (action.state_dim * config.text_dim + config.text_dim**2)
    return float(embedding + state + config.num_layers * 4 * action.dim * config.video.dim * tokens)


def training_flops(*args: int, **kwargs: int) -> float:
    """Forward and backward of one sample: three times `forward_flops`."""
    return 3 * forward_flops(*args, **kwargs)


def _video_flops(config: ModelConfig, frames: int, tokens_per_frame: int, context_tokens: int, history: int) -> int:
    video, width = config.video, config.video.dim
    tokens = frames * tokens_per_frame
    patch = video.latent_channels * video.patch_size[0] * video.patch_size[1] * video.patch_size[2]
    flops = 2 * 2 * tokens * patch * width  # patch embedding and head
    flops += _embedding_flops(config, width, frames, context_tokens)
    for kind in layer_kinds(config):
        flops += _cross_and_ffn_flops(width, width, video.ffn_dim, tokens, context_tokens)
        if kind == "GATED":
            flops += tokens * _gdn_flops(config)
            continue
        spec = WindowSpec.of(kind, video)
        read = sum(len(key_frames(spec, f, frames, history)) for f in range(frames)) * tokens_per_frame**2
        flops += tokens * 8 * width * width + 4 * width * read
    return flops


def _action_flops(config: ModelConfig, actions: int, context_tokens: int, history_tokens: int) -> int:
    action, attention = config.action, config.video.dim
    flops = 2 * 2 * actions * action.action_dim * action.dim
    flops += 2 * (action.state_dim * config.text_dim + config.text_dim**2)
    flops += _embedding_flops(config, action.dim, 1, context_tokens)
    for kind in layer_kinds(config):
        keys = actions + (0 if kind == "GATED" else history_tokens)
        flops += actions * (8 * action.dim * attention + 4 * attention * keys)
        flops += _cross_and_ffn_flops(action.dim, attention, action.ffn_dim, actions, context_tokens)
    return flops


def _embedding_flops(config: ModelConfig, dim: int, times: int, context_tokens: int) -> int:
    """Text embedding of every context token, time embedding and projection of every distinct timestep."""
    text = 2 * context_tokens * (config.text_dim * dim + dim * dim)
    return text + 2 * times * (config.freq_dim * dim + dim * dim + 6 * dim * dim)


def _cross_and_ffn_flops(dim: int, attention: int, ffn: int, tokens: int, context_tokens: int) -> int:
    cross = 4 * dim * attention * (tokens + context_tokens) + 4 * attention * tokens * context_tokens
    return cross + 4 * tokens * dim * ffn


def _gdn_flops(config: ModelConfig) -> int:
    """Per token: projections, convolutions, and the chunked recurrence of `delta_rule` with chunk C = 64.

    Of the recurrence: K·Kᵀ and Q·Kᵀ (2·2·C·K), T times V + K columns (2·C·(V + K)), W·S, Q·S and the state update
    (3·2·K·V), scores times values (2·C·V). Triangular matrices count as full ones: kernels multiply all of them.
    """
    video, heads = config.video, config.num_heads
    key, value = video.gdn_key_dim, video.gdn_value_dim
    projections = 2 * video.dim * heads * (2 * key + 3 * value + 2)
    convolutions = 2 * video.gdn_conv_size * heads * (2 * key + value)
    recurrence = heads * (4 * CHUNK * key + 2 * CHUNK * (value + key) + 6 * key * value + 2 * CHUNK * value)
    return projections + convolutions + recurrence
