"""Every setting of a run, as plain dataclasses: the schema that hydra's Compose API fills from `configs/`.

Only the standard library is imported here, so that inference can read a saved configuration without hydra. The numbers
that stand as defaults are the full-size ones of the published model; what the publication leaves open and this project
chose is marked *ours*. Cross-field rules live in `kairos_train.config.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dataloaders.config import DataConfig
from kairos_train.config.operation_schema import (
    ClusterConfig,
    FaultsConfig,
    GuardConfig,
    MonitorConfig,
    WatchConfig,
)
from parallel.config import Fp8Config, ParallelConfig

MISSING = "???"
"""A mandatory value that has not been given."""

ATTENTION_KINDS = ("SWA", "DSWA", "FA", "GATED")
WINDOW_SEMANTICS = ("frame", "token")
CONDITIONS = ("t2v", "ti2v", "i2v", "null2v")
IMAGE_CONDITIONS = ("t2i", "n2i")


@dataclass
class VideoStreamConfig:
    """The video DiT. Widths in channels, windows in latent frames."""

    dim: int = 2560
    ffn_dim: int = 10240
    latent_channels: int = 16
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])  # frames, height, width; the first must be 1
    layer_cycle: list[str] = field(default_factory=lambda: ["SWA", "SWA", "DSWA", "GATED"])
    window_frames: int = 3
    dilation: int = 4
    window_semantics: str = "frame"  # frame | token (the reading of the public video-only checkpoints)
    restrict_history_query_to_history: bool = True  # on for the world-action model: exact action-only inference
    all_attend_history: bool = False
    history_causal: bool = False  # ours: a history frame sees itself and earlier ones; its keys and states carry over
    gdn_key_dim: int = 256
    gdn_value_dim: int = 512
    gdn_conv_size: int = 4


@dataclass
class ActionStreamConfig:
    """The action DiT: same depth and attention width as the video stream, its own width."""

    dim: int = 1024
    ffn_dim: int = 4096
    action_dim: int = 14
    state_dim: int = 14


@dataclass
class ModelConfig:
    """Mixture-of-Transformers: `num_layers` layers of both streams, `num_heads` heads of `video.dim / num_heads`."""

    name: str = "kairos_4b"
    num_layers: int = 32
    num_heads: int = 20
    text_dim: int = 2048
    freq_dim: int = 256
    eps: float = 1e-6
    video: VideoStreamConfig = field(default_factory=VideoStreamConfig)
    action: ActionStreamConfig | None = field(default_factory=ActionStreamConfig)  # null: video stream alone


@dataclass
class KernelsConfig:
    """Which implementation computes what; `auto` picks by device, and the choice is logged and saved."""

    attention: str = "auto"  # auto | gathered | flex | dense (dense masks: the oracle, small sizes only)
    gated_delta: str = "auto"  # auto | torch | fla (CUDA only)


@dataclass
class VideoEncoderConfig:
    """Frames -> latents. `block_dct` is weight-free; `wan` is the real Wan2.1 VAE from local weights."""

    kind: str = "wan"  # wan | block_dct
    path: str | None = None  # wan: Diffusers folder or original .pth
    sample_posterior: bool = False  # wan: the mode of the posterior by default (ours)


@dataclass
class TextEncoderConfig:
    """Prompt (and first frame) -> context. `hashed_ngrams` is weight-free; `qwen` the real VLM from local weights."""

    kind: str = "qwen"  # qwen | hashed_ngrams
    path: str | None = None  # qwen: model folder
    text_dim: int = 2048
    max_tokens: int = 1024  # longest sequence read, in tokens (qwen: the 97 that are cut off included)


@dataclass
class EncodersConfig:
    name: str = "wan_qwen"
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)


@dataclass
class CaptionShare:
    """How often one of a sample's captions is taken, relative to the others, from the stage's start to its end."""

    name: str = "???"  # as in the index of the shards
    start: float = 1.0
    end: float | None = None  # in between the share changes linearly; null: it stays


@dataclass
class LoraConfig:
    """Low-rank adapters; the streams that have them train nothing else."""

    rank: int | None = None  # null: no adapters, all weights train
    alpha: float = 16.0  # ours: B·A counts alpha / rank
    streams: list[str] = field(default_factory=lambda: ["video"])  # video, action
    targets: list[str] = field(  # of every layer that has them; ours: all that read or write tokens
        default_factory=lambda: [
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o"),
            *("gated_delta.q_proj", "gated_delta.k_proj", "gated_delta.v_proj", "gated_delta.o_proj"),
            *("cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2"),
        ]
    )


@dataclass
class StageConfig:
    """One stage of the curriculum: which streams train, on which conditions, how the loss is weighed."""

    name: str = "joint"
    streams: str = "joint"  # video | joint
    conditions: dict[str, float] = field(default_factory=lambda: {"ti2v": 1.0})  # probabilities, summing to 1
    image_conditions: dict[str, float] = field(
        default_factory=lambda: {"t2i": 1.0}
    )  # the same, of samples of one frame
    captions: list[CaptionShare] = field(default_factory=list)  # empty: each sample's primary one
    history_frames: int = 1  # K of conditions that give frames (ti2v, i2v)
    cfg_dropout: float = 0.1  # ours
    loss_weighting: str = "bell"  # bell | plain
    video_loss_weight: float = 1.0  # ours
    action_loss_weight: float = 1.0  # ours
    action_dim_weights: list[float] | None = None  # per action dimension, summing to 1; null: uniform
    action_shift: float = 5.0
    train_video: bool = True  # false: the video stream is frozen
    lora: LoraConfig = field(default_factory=LoraConfig)
    init_from: str | None = None  # checkpoint folder whose weights this stage starts from; null: fresh weights
    init_weights: str = (
        "ema"  # ema | raw: which weights of `init_from` | both: weights from raw, their average from ema
    )
    action_init: str = "interpolate"  # interpolate | random: action stream, when `init_from` has none
    lr: float = 1e-4
    weight_decay: float = 1e-2


@dataclass
class OptimizerConfig:
    name: str = "adamw"  # adamw | sgd (plain, for comparing layouts)
    lr: float = 1e-4
    weight_decay: float = 1e-2  # not on norms, biases, A_log, dt_bias, modulations
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    warmup_steps: int = 500
    schedule: str = "constant"  # constant | cosine, after the warm-up
    min_lr_ratio: float = 0.0  # cosine: last learning rate / lr
    gradient_clip: float = 1.0


@dataclass
class PrecisionConfig:
    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass
class TrainConfig:
    steps: int | None = 1000  # the stage's length: one of steps, epochs, samples and tokens
    epochs: int | None = None  # of all sources together
    samples: int | None = None
    tokens: int | None = None  # of video and actions, as the model sees them
    micro_batch: int = 16  # samples per rank and forward pass
    accumulation: int = 1  # micro-batches per optimiser step
    precision: str = "bf16"  # bf16 | fp32
    zero_stage: int = 1
    stage3_param_persistence_threshold: int = 100_000  # parameters of fewer numbers stay whole in ZeRO stage 3
    stage3_max_live_parameters: int = 1_000_000_000  # numbers that stage 3 keeps gathered for their next use
    device: str = "auto"  # auto | cpu | cuda
    ema_decay: float = 0.999  # ours
    checkpoint_every: int = 500
    keep_last: int = 3
    keep_every: int = 0  # steps; 0: only the last ones
    keep_best: bool = True  # ours: also the one with the lowest validation loss
    log_every: int = 10
    validate_every: int = 500  # 0: never
    validation_batches: int = 4
    sample_every: int = 500  # steps between sampled windows in TensorBoard; 0: never
    on_nonfinite: str = "skip"  # skip: as `guard` says | stop: at the first non-finite loss or gradient norm
    resume: str = "auto"  # auto: from the newest checkpoint of run_dir when there is one | never | must
    peak_tflops: float | None = None  # of one device in this precision, for MFU; null: known devices only
    recompute: str = "none"  # none | block | selective (all but attention outputs and states): activations in backward
    offload_activations: bool = False  # keep what is saved for backward in host memory
    async_checkpoint: bool = True  # write checkpoints behind the training loop
    failed_checkpoints: int = 3  # this many failed writes in a row are tolerated; the next one ends the run (ours)
    deadline: str | None = None  # local time as in 2026-01-31T18:00:00; the run saves and ends before it
    deadline_margin: float = 300.0  # seconds before the deadline (ours)
    dry_run: bool = True  # before the first step, one of the largest batch, whose update is dropped


@dataclass
class CurriculumStage:
    """A stage of an experiment: its name, and what it sets on top of the experiment's own settings."""

    name: str = "???"
    set: list[str] = field(default_factory=list)  # GROUP=OPTION and KEY=VALUE, as on the command line, which wins


@dataclass
class CurriculumConfig:
    """Stages that `kairos-train train` walks, each from the weights of the one before. Empty: the run is one stage."""

    stages: list[CurriculumStage] = field(default_factory=list)
    first: str | None = None  # name of the stage to begin with; null: the first
    last: str | None = None  # name of the stage to end with; null: the last


@dataclass
class Config:
    """One run. Saved resolved as `config.yaml` with the run, every checkpoint and every export."""

    experiment: str = "custom"
    seed: int = 0
    run_dir: str = "runs/${experiment}/${stage.name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    prepare: list[str] = field(default_factory=list)  # kairos-train commands that make the data, each with --out
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)


def stage_model(config: Config) -> ModelConfig:
    """The model that a stage trains and its checkpoints hold: a video stage has no action stream."""
    return replace(config.model, action=None) if config.stage.streams == "video" else config.model
