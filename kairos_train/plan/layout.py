"""What is planned: one sample's shapes, the degrees, and each rank's part of tokens, frames, widths and parameters.

Shapes: B samples of a micro-batch, F latent frames, L tokens per frame, l of them between layers on one tensor rank,
N context tokens, A actions, K history frames, W attention width, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from kairos_train.basics.errors import UserError
from kairos_train.basics.geometry import latent_frames, latent_sides
from kairos_train.config.schema import ActionStreamConfig, Config, ModelConfig, VideoStreamConfig, stage_model
from kairos_train.model.flops import forward_flops
from kairos_train.model.kernels.windows import WindowSpec, frames_read, key_frames
from kairos_train.model.layout import check_widths
from kairos_train.model.lora import adapter_shapes
from kairos_train.model.public_keys import public_keys
from kairos_train.model.sharding_rules import sharding_table
from kairos_train.model.streams import layer_kinds
from kairos_train.model.trainable import trains
from parallel.exchange.frame_plan import FramePlan, plan_frames
from parallel.fp8 import Fp8Policy
from parallel.sharding import ShardingError
from parallel.topology import Degrees, split_frames

FRAME_CONDITIONS = ("ti2v", "i2v")
"""The conditions that give history frames."""


@dataclass(frozen=True)
class SampleShape:
    """Shapes of one sample, and its model FLOPs.

    Attributes:
        frames: F.
        tokens: L.
        context: N text tokens, the state token not counted.
        history: K, where a condition gives frames.
        actions: A; 0 where the data or the stage has none.
        video_flops, action_flops: of each stream's forward pass.
    """

    frames: int
    tokens: int
    context: int
    history: int
    actions: int
    video_flops: float
    action_flops: float

    @classmethod
    def of(cls, config: Config, context_tokens: int) -> SampleShape:
        """What `data.window` and the stage give. An empty `data.window.action_key` means data without actions."""
        window, patch = config.data.window, config.model.video.patch_size
        beside = len(window.cameras) if window.layout == "side_by_side" and isinstance(window.cameras, list) else 1
        height, width = window.height, window.width * max(beside, 1)
        acting = config.stage.streams == "joint" and window.action_key
        given = any(config.stage.conditions.get(name, 0) > 0 for name in FRAME_CONDITIONS)
        frames, (rows, columns) = latent_frames(window.frames), latent_sides(height, width)
        tokens = (rows // patch[1]) * (columns // patch[2])
        actions = (window.frames - 1) * window.action_video_freq_ratio if acting else 0
        history = config.stage.history_frames if given else 0
        shape, model = (frames, tokens, context_tokens), stage_model(config)
        video = forward_flops(model, *shape, history=history)
        both = forward_flops(model, *shape, history=history, actions=actions)
        return cls(*shape, history=history, actions=actions, video_flops=video, action_flops=both - video)

    @property
    def flops(self) -> float:
        """Forward and backward, nothing computed again."""
        return 3 * (self.video_flops + self.action_flops)

    @property
    def video_tokens(self) -> int:
        """F·L."""
        return self.frames * self.tokens

    @property
    def all_context(self) -> int:
        """N with the state token."""
        return self.context + (1 if self.actions else 0)


@dataclass(frozen=True)
class Parameters:
    """Numbers of one tensor rank's parameters, and of the whole model's."""

    trained: int
    frozen: int
    whole_trained: int
    whole_frozen: int
    partial: int  # replicated, with gradients that tensor ranks sum


@dataclass(frozen=True)
class Layout:
    """A legal way to run `config` on a number of GPUs. Made by `Layout.of`."""

    config: Config
    sample: SampleShape
    degrees: Degrees
    parameters: Parameters

    @classmethod
    def of(cls, config: Config, sample: SampleShape, *, gpus: int) -> Layout:
        """The layout of `config.parallel` on `gpus` GPUs.

        Args:
            sample: of this configuration; layouts do not change it.

        Raises:
            UserError: the degrees do not divide what they split.
        """
        tensor = config.parallel.tensor
        if config.model.num_heads % tensor:
            raise UserError(f"parallel.tensor={tensor} does not divide model.num_heads={config.model.num_heads}")
        try:
            parameters = _parameters(config)
        except ShardingError as error:
            raise UserError(f"parallel.tensor={tensor}: {error}; use a degree that divides it") from error
        if config.parallel.sequence and sample.tokens % tensor:
            raise UserError(
                f"parallel.sequence=true: the {sample.tokens} tokens of a frame do not divide over parallel.tensor="
                f"{tensor} ranks; use another resolution or parallel.sequence=false"
            )
        if (config.train.recompute, config.train.zero_stage) == ("selective", 3):
            raise UserError(
                "train.recompute=selective with train.zero_stage=3: selective recomputation cannot replay gathering "
                "weights; use train.recompute=block or train.zero_stage=2"
            )
        check_widths(Fp8Policy(config.precision.fp8, config.model.num_layers), stage_model(config), tensor)
        return cls(config, sample, Degrees.of(config.parallel, gpus), parameters)

    # --- sizes ---

    @property
    def model(self) -> ModelConfig:
        """What the stage trains."""
        return stage_model(self.config)

    @property
    def batch(self) -> int:
        """B: samples of one rank's micro-batch, by the token budget where there is one."""
        budget = self.config.data.tokens_per_micro_batch
        return self.config.train.micro_batch if budget is None else max(1, budget // self.sample.video_tokens)

    @property
    def samples_per_step(self) -> int:
        """Of all ranks and micro-batches."""
        return self.batch * self.config.train.accumulation * self.degrees.data

    @property
    def compute_bytes(self) -> int:
        """Of one number in the precision of the weights: bf16 or fp32."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def gradient_ranks(self) -> int:
        """Ranks over which gradients are averaged and ZeRO partitions."""
        return self.degrees.context * self.degrees.data

    @property
    def heads(self) -> int:
        """Of one tensor rank."""
        return self.model.num_heads // self.degrees.tensor

    @property
    def attention_width(self) -> int:
        """W of one tensor rank."""
        return self.model.video.dim // self.degrees.tensor

    def ffn_width(self, stream: VideoStreamConfig | ActionStreamConfig) -> int:
        """Hidden width of one tensor rank's FFN."""
        return stream.ffn_dim // self.degrees.tensor

    @property
    def tokens_between_layers(self) -> int:
        """l: tokens of a frame that one tensor rank holds between layers."""
        return self.sample.tokens // (self.degrees.tensor if self.config.parallel.sequence else 1)

    # --- frames ---

    @cached_property
    def frames_per_rank(self) -> tuple[int, ...]:
        """Of each context rank."""
        return tuple(len(share) for share in split_frames(self.sample.frames, self.degrees.context))

    @property
    def tokens_per_rank(self) -> tuple[int, ...]:
        """Video tokens of one sample on each context rank."""
        return tuple(frames * self.sample.tokens for frames in self.frames_per_rank)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The attention kind of every video layer."""
        return tuple(layer_kinds(self.model))

    @cached_property
    def frame_plans(self) -> dict[str, FramePlan]:
        """The exchange of every windowed kind, as the model asks for it."""
        sample, video = self.sample, self.model.video
        plans = {}
        for kind in sorted(set(self.kinds) - {"GATED"}):
            rule = WindowSpec.of(kind, video)
            plans[kind] = plan_frames(
                sample.frames,
                frames_read(rule, sample.frames, (sample.history,)),
                tuple(range(sample.history if sample.actions else 0)),
                ranks=self.degrees.context,
                period=rule.step(sample.frames),
                hidden=self.tokens_between_layers * video.dim,
                kv=2 * sample.tokens * self.attention_width,
                choice=self.config.parallel.frame_layout,
            )
        return plans

    def copied_frames(self, kind: str, rank: int) -> int | None:
        """Key frames that gathered windows copy for `rank`; None where its queries read all local keys as they are.

        Frames that read the same keys share one copy; frames of zero padding are copied too.
        """
        plan = self.frame_plans[kind]
        return _copied(
            WindowSpec.of(kind, self.model.video),
            self.sample.frames,
            self.sample.history,
            plan.queries[rank],
            plan.keys[rank],
        )


@lru_cache(maxsize=4096)
def _copied(rule: WindowSpec, frames: int, history: int, queries: tuple[int, ...], keys: tuple[int, ...]) -> int | None:
    reads = [key_frames(rule, f, frames, history) for f in queries]
    banded = rule.token_window and rule.kind != "FA"  # then a window belongs to its query frame
    distinct = reads if banded else list(dict.fromkeys(reads))
    if not banded and all(read == keys for read in distinct):
        return None
    return sum(len(read) for read in distinct)


def _parameters(config: Config) -> Parameters:
    shapes, lora = public_keys(stage_model(config)), config.stage.lora
    if lora.rank is not None:
        shapes |= adapter_shapes(shapes, lora)
    sizes = tuple((name, shape, trains(name, config.stage)) for name, shape in shapes.items())
    return _counted(sizes, config.parallel.tensor, config.parallel.sequence)


@lru_cache(maxsize=64)
def _counted(sizes: tuple[tuple[str, tuple[int, ...], bool], ...], tensor: int, sequence: bool) -> Parameters:
    """Of parameters by name, with their full shapes and whether they train."""
    table = sharding_table(tensor=tensor, sequence=sequence, names=[name for name, _, _ in sizes])
    trained = frozen = whole_trained = whole_frozen = partial = 0
    for name, shape, trains_here in sizes:
        here = prod(table.local_shape(name, shape))
        if trains_here:
            trained, whole_trained = trained + here, whole_trained + prod(shape)
            partial += here if table[name].kind == "replicated_partial" and tensor > 1 else 0
        else:
            frozen, whole_frozen = frozen + here, whole_frozen + prod(shape)
    return Parameters(trained, frozen, whole_trained, whole_frozen, partial)
