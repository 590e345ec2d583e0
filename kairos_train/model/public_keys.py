"""The public checkpoint layout as a table: every key and shape, from the configuration alone.

Written from the release's key list, not from this project's modules, so that a renamed module is caught by comparison.

The other way round, tensors bound the sizes that a configuration may state, before anything is built of them.
"""

from collections.abc import Mapping

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import ModelConfig
from kairos_train.model.streams import layer_kinds

Shapes = dict[str, tuple[int, ...]]

PACKED = 2
"""Columns of a weight in one column of its tensor, at most: two int4 values share a byte."""


def public_keys(config: ModelConfig) -> Shapes:
    """Key → shape of a checkpoint of `config`: `video_dit.…` and, with an action stream, `action_dit.…`."""
    video, shapes = config.video, {}
    patch = (video.latent_channels, *video.patch_size)
    volume = video.latent_channels * video.patch_size[0] * video.patch_size[1] * video.patch_size[2]
    shapes |= _linear("patch_embedding", (video.dim, *patch))
    shapes |= _stream(config, video.dim)
    shapes |= {"head.modulation": (1, 2, video.dim)} | _linear("head.head", (volume, video.dim))
    for i, kind in enumerate(layer_kinds(config)):
        shapes |= _block(f"blocks.{i}", video.dim, video.dim, video.ffn_dim, self_attention=kind != "GATED")
        if kind == "GATED":
            shapes |= _gdn(f"blocks.{i}.gated_delta", config)
    keys = {f"video_dit.{k}": v for k, v in shapes.items()}
    if config.action is None:
        return keys
    action = config.action
    shapes = _linear("action_encoder", (action.dim, action.action_dim))
    shapes |= _linear("proprio_encoder.0", (config.text_dim, action.state_dim))
    shapes |= _linear("proprio_encoder.2", (config.text_dim, config.text_dim))
    shapes |= _stream(config, action.dim) | _linear("head", (action.action_dim, action.dim))
    for i in range(config.num_layers):
        shapes |= _block(f"blocks.{i}", action.dim, video.dim, action.ffn_dim, self_attention=True)
    return keys | {f"action_dit.{k}": v for k, v in shapes.items()}


def _linear(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _stream(config: ModelConfig, dim: int) -> Shapes:
    return (
        _linear("text_embedding.0", (dim, config.text_dim))
        | _linear("text_embedding.2", (dim, dim))
        | _linear("time_embedding.0", (dim, config.freq_dim))
        | _linear("time_embedding.2", (dim, dim))
        | _linear("time_projection.1", (6 * dim, dim))
    )


def _attention(name: str, dim: int, width: int) -> Shapes:
    shapes: Shapes = {f"{name}.norm_q.weight": (width,), f"{name}.norm_k.weight": (width,)}
    for part in "qkv":
        shapes |= _linear(f"{name}.{part}", (width, dim))
    return shapes | _linear(f"{name}.o", (dim, width))


def _block(name: str, dim: int, width: int, ffn: int, *, self_attention: bool) -> Shapes:
    shapes: Shapes = {f"{name}.modulation": (1, 6, dim)}
    if self_attention:
        shapes |= _attention(f"{name}.self_attn", dim, width)
    shapes |= _attention(f"{name}.cross_attn", dim, width) | _linear(f"{name}.cross_attn_norm", (dim,))
    return shapes | _linear(f"{name}.ffn.0", (ffn, dim)) | _linear(f"{name}.ffn.2", (dim, ffn))


def _gdn(name: str, config: ModelConfig) -> Shapes:
    video, heads = config.video, config.num_heads
    key, value, conv = heads * video.gdn_key_dim, heads * video.gdn_value_dim, video.gdn_conv_size
    return {
        f"{name}.A_log": (heads,),
        f"{name}.dt_bias": (heads,),
        f"{name}.q_proj.weight": (key, video.dim),
        f"{name}.k_proj.weight": (key, video.dim),
        f"{name}.v_proj.weight": (value, video.dim),
        f"{name}.a_proj.weight": (heads, video.dim),
        f"{name}.b_proj.weight": (heads, video.dim),
        f"{name}.g_proj.weight": (value, video.dim),
        f"{name}.o_proj.weight": (video.dim, value),
        f"{name}.q_conv1d.weight": (key, 1, conv),
        f"{name}.k_conv1d.weight": (key, 1, conv),
        f"{name}.v_conv1d.weight": (value, 1, conv),
        f"{name}.o_norm.weight": (video.gdn_value_dim,),
    }


def refuse_larger(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Return if no size of a configuration is larger than the tensors of its weights have room for.

    Whether the tensors are those of the model is compared when it is there, without storage.

    Args:
        shapes: of the tensors, by parameter name.
        where: the file of the configuration, for messages.

    Raises:
        UserError: one is larger, or no size at all.
    """
    layers = len({name.split(".")[2] for name in shapes if name.startswith("video_dit.blocks.")})
    widest = PACKED * max((size for shape in shapes.values() for size in shape), default=0)
    for key, size in _sizes(config).items():
        most = layers if key == "num_layers" else widest
        if type(size) is not int or not 1 <= size <= most:
            raise UserError(
                f"{where}: model.{key}={str(size)[:40]}, but the tensors of the weights have"
                f" {f'{layers} layers' if key == 'num_layers' else f'sizes from 1 to {most}'};"
                " weights and configuration do not belong together"
            )


def _sizes(config: ModelConfig) -> dict[str, int]:
    """The settings by which tensors grow, by dotted key."""
    video, action = config.video, config.action
    sizes = {name: getattr(config, name) for name in ("num_layers", "num_heads", "text_dim", "freq_dim")}
    sizes |= {f"video.{name}": getattr(video, name) for name in ("dim", "ffn_dim", "latent_channels")}
    sizes |= {f"video.patch_size[{i}]": size for i, size in enumerate(video.patch_size)}
    if "GATED" in video.layer_cycle:
        sizes |= {f"video.{name}": getattr(video, name) for name in ("gdn_key_dim", "gdn_value_dim", "gdn_conv_size")}
    if action is not None:
        names = ("dim", "ffn_dim", "action_dim", "state_dim")
        sizes |= {f"action.{name}": getattr(action, name) for name in names}
    return sizes
