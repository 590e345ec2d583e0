"""The two streams before and after their blocks (model specification, "One stream, before and after the blocks").

Shapes: B batch, C latent channels, F latent frames, H×W latent height and width, h×w patches, L = h·w tokens per frame,
l of them on this rank between layers, A actions, N context tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import KernelsConfig, ModelConfig
from kairos_train.model import timestep
from kairos_train.model.activations import ActivationPolicy
from kairos_train.model.block import Block
from kairos_train.model.gated_delta_net import GatedDeltaNet
from kairos_train.model.hooks import ParallelHooks
from kairos_train.model.kernels import rotary
from kairos_train.model.kernels.attention import select_backend
from kairos_train.model.kernels.windows import WindowSpec
from kairos_train.model.precision import LayerNorm, dtype_of, upcast, wide


def layer_kinds(config: ModelConfig) -> list[str]:
    """The attention kind of every video layer, first to last."""
    cycle = config.video.layer_cycle
    return [cycle[i % len(cycle)] for i in range(config.num_layers)]


def text_embedding(text_dim: int, dim: int) -> nn.Sequential:
    """Linear, SiLU, Linear: context width → D."""
    return nn.Sequential(nn.Linear(text_dim, dim), nn.SiLU(), nn.Linear(dim, dim))


class PatchEmbedding(nn.Conv3d):
    """A convolution whose kernel is its stride, computed as the matrix product that it is; fast in backward too.

    Args:
        channels: C.
        dim: D.
        patch: (1, ph, pw).
    """

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, dim, patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents (B, C, F, H, W) → tokens in raster order (B, F, L, D)."""
        _, ph, pw = self.kernel_size
        x = latents.to(self.weight.dtype).unflatten(-1, (-1, pw)).unflatten(-3, (-1, ph))  # B C F h ph w pw
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)  # B F h w (C ph pw)
        return F.linear(x, self.weight.flatten(1), self.bias).flatten(2, 3)


class VideoHead(nn.Module):
    """Modulated LayerNorm, then Linear D → patch volume · C. Unlike the blocks: shift first, scale second."""

    def __init__(self, dim: int, out_features: int, eps: float) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, eps, affine=False)
        self.head = nn.Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.empty(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, F, L, D), time embedding (B, F, D) → (B, F, L, out_features)."""
        shift, scale = (upcast(self.modulation)[:, None] + time[:, :, None]).unsqueeze(3).unbind(2)
        return self.head((self.norm(x) * (1 + scale) + shift).to(x.dtype))


class VideoStream(nn.Module):
    """Patches, embeddings, blocks and head of the video DiT. State keys are the public checkpoint's.

    Attributes:
        window_specs: of each layer; None at Gated DeltaNet layers.
        attention_backend: what computes windows.
        activations: what layers keep for the backward pass.
    """

    def __init__(
        self, config: ModelConfig, hooks: ParallelHooks, kernels: KernelsConfig, activations: ActivationPolicy
    ) -> None:
        super().__init__()
        self.hooks, self.activations = hooks, activations
        self.attention_backend = select_backend(kernels.attention)
        video, eps = config.video, config.eps
        self.patch_size, self.channels = tuple(video.patch_size), video.latent_channels
        self.head_dim, self.freq_dim = video.dim // config.num_heads, config.freq_dim
        patch = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        self.patch_embedding = PatchEmbedding(self.channels, video.dim, self.patch_size)
        self.text_embedding = text_embedding(config.text_dim, video.dim)
        self.time_embedding = timestep.time_embedding(config.freq_dim, video.dim)
        self.time_projection = timestep.time_projection(video.dim)
        self.blocks = nn.ModuleList()
        self.window_specs: list[WindowSpec | None] = []
        for layer, kind in enumerate(layer_kinds(config)):
            gated, own = None, hooks.for_layer(layer)
            self.window_specs.append(None if kind == "GATED" else WindowSpec.of(kind, video))
            if kind == "GATED":
                gated = GatedDeltaNet(
                    dim=video.dim,
                    heads=config.num_heads,
                    key_dim=video.gdn_key_dim,
                    value_dim=video.gdn_value_dim,
                    conv_size=video.gdn_conv_size,
                    eps=eps,
                    hooks=own,
                    backend=kernels.gated_delta,
                )
            self.blocks.append(
                Block(
                    dim=video.dim,
                    ffn_dim=video.ffn_dim,
                    heads=config.num_heads,
                    head_dim=self.head_dim,
                    eps=eps,
                    hooks=own,
                    gated=gated,
                )
            )
        self.head = VideoHead(video.dim, patch * self.channels, eps)

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents (B, C, F, H, W) → tokens (B, F, l, D).

        Raises:
            UserError: H or W not divisible by the patch.
        """
        _, ph, pw = self.patch_size
        height, width = latents.shape[-2:]
        if height % ph or width % pw:
            raise UserError(f"latents of {height}×{width} do not divide into patches of {ph}×{pw}; resize the video")
        return self.hooks.split_tokens(self.patch_embedding(latents))

    def tokens(self, height: int, width: int) -> int:
        """L for a latent height and width."""
        return (height // self.patch_size[1]) * (width // self.patch_size[2])

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """(B, F, l, ph·pw·C) → (B, C, F, H, W) for a latent height and width."""
        x = self.hooks.join_tokens(x)
        _, ph, pw = self.patch_size
        x = x.unflatten(2, (height // ph, width // pw)).unflatten(-1, (ph, pw, self.channels))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # B C F (h ph) (w pw)

    def frame_times(self, timesteps: Tensor, history: tuple[int, ...], frames: int) -> Tensor:
        """Timestep of every frame (B, F): 0 on the first K of each sample, the sample's elsewhere."""
        num_history = torch.tensor(history, device=timesteps.device)
        is_history = torch.arange(frames, device=timesteps.device) < num_history[:, None]
        return timesteps[:, None].expand(-1, frames).masked_fill(is_history, 0.0)

    def embed_time(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Times (B, F) → embedding (B, F, D) and projection (B, F, 6, D), float32 or wider."""
        embedded = self.time_embedding(_sinusoid(times, self.freq_dim, self.time_embedding))
        return embedded, self.time_projection(embedded).unflatten(-1, (6, -1))

    def embed_context(self, context: Tensor) -> Tensor:
        """(B, N, text_dim) → (B, N, D), as cross-attention takes it."""
        return self.hooks.enter_context(self.text_embedding(context))

    def rotation(self, frames: tuple[int, ...], height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the tokens of the frames with these numbers, (F, L, 1, E/2)."""
        _, ph, pw = self.patch_size
        numbers = torch.tensor(frames, device=like.device)
        angles = rotary.grid_angles(numbers, height // ph, width // pw, self.head_dim)
        return rotary.rotation(angles, upcast(like[:0]).dtype)


class ActionStream(nn.Module):
    """Embeddings, blocks and head of the action DiT; every layer is full attention of the video's attention width."""

    def __init__(self, config: ModelConfig, hooks: ParallelHooks, activations: ActivationPolicy) -> None:
        super().__init__()
        self.hooks, self.activations = hooks, activations
        action = config.action
        if action is None:
            raise UserError("model.action is null: this model has no action stream; choose one with an action section")
        self.head_dim, self.freq_dim = config.video.dim // config.num_heads, config.freq_dim
        self.action_encoder = nn.Linear(action.action_dim, action.dim)
        self.proprio_encoder = nn.Sequential(
            nn.Linear(action.state_dim, config.text_dim), nn.SiLU(), nn.Linear(config.text_dim, config.text_dim)
        )
        self.text_embedding = text_embedding(config.text_dim, action.dim)
        self.time_embedding = timestep.time_embedding(config.freq_dim, action.dim)
        self.time_projection = timestep.time_projection(action.dim)
        self.blocks = nn.ModuleList(
            Block(
                dim=action.dim,
                ffn_dim=action.ffn_dim,
                heads=config.num_heads,
                head_dim=self.head_dim,
                eps=config.eps,
                hooks=hooks.for_layer(layer),
            )
            for layer in range(config.num_layers)
        )
        self.head = nn.Linear(action.dim, action.action_dim)

    def embed_context(self, context: Tensor) -> Tensor:
        """(B, N, text_dim) → (B, N, D), as cross-attention takes it."""
        return self.hooks.enter_context(self.text_embedding(context))

    def embed_time(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) → projection (B, 1, 6, D), float32 or wider."""
        embedded = self.time_embedding(_sinusoid(timesteps[:, None], self.freq_dim, self.time_embedding))
        return self.time_projection(embedded).unflatten(-1, (6, -1))

    def rotation(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the action tokens, (A, 1, E/2)."""
        angles = rotary.sequence_angles(length, self.head_dim, like.device)
        return rotary.rotation(angles, upcast(like[:0]).dtype)


def _sinusoid(times: Tensor, freq_dim: int, mlp: nn.Sequential) -> Tensor:
    """Sinusoids in the precision that the MLP computes in."""
    return timestep.sinusoid(times, freq_dim).to(wide(dtype_of(mlp)))
