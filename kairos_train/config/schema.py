"""Every setting of a run, as plain dataclasses: the schema that hydra's Compose API fills from `configs/`.

Only the standard library is imported here, so that inference can read a saved configuration without hydra. The numbers
that stand as defaults are the full-size ones of the published model; what the publication leaves open and this project
chose is marked *ours*. A setting's line has its default, the rule of its values, whether a resumed run may change it
(`kairos_train.basics.setting`) and, behind or above it, what it is. Rules that compare settings live in
`kairos_train.config.validate`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dataloaders.config import DataConfig
from kairos_train.basics.setting import FRACTION, NOT_NEGATIVE, POSITIVE, one_of, setting, up_to
from kairos_train.config.operation_schema import (
    ClusterConfig,
    FaultsConfig,
    GuardConfig,
    MonitorConfig,
    WatchConfig,
)
from parallel.config import Fp8Config, ParallelConfig

ATTENTION_KINDS = ("SWA", "DSWA", "FA", "GATED")
MAX_WIDTH = 2**17
"""Far above any transformer's; what is allocated by a width grows with its square."""

CONDITIONS = ("t2v", "ti2v", "i2v", "null2v")
IMAGE_CONDITIONS = ("t2i", "n2i")


@dataclass
class VideoStreamConfig:
    """The video DiT. Widths in channels, windows in latent frames."""

    dim: int = setting(2560, up_to(MAX_WIDTH))  # width of its tokens, of all attention heads together
    ffn_dim: int = setting(10240, up_to(MAX_WIDTH))  # inner width of feed-forward layers
    latent_channels: int = 16  # of the latents that are read and written; those of the video encoder
    patch_size: list[int] = field(default_factory=lambda: [1, 2, 2])  # frames, height, width; the first must be 1
    # kinds of the layers, repeated: SWA | DSWA (dilated) | FA (full) | GATED (Gated DeltaNet)
    layer_cycle: list[str] = field(default_factory=lambda: ["SWA", "SWA", "DSWA", "GATED"])
    window_frames: int = setting(3, POSITIVE)  # a frame sees those less than this many frames away
    dilation: int = setting(4, POSITIVE)  # DSWA: frames from one that is seen to the next
    window_semantics: str = setting("frame", one_of("frame", "token"))  # token: as public video-only checkpoints
    restrict_history_query_to_history: bool = True  # on for the world-action model: exact action-only inference
    all_attend_history: bool = False  # every frame sees all history frames as well
    history_causal: bool = False  # ours: a history frame sees itself and earlier ones; its keys and states carry over
    gdn_key_dim: int = setting(256, up_to(MAX_WIDTH))  # GATED: width of a head's keys and queries
    gdn_value_dim: int = setting(512, up_to(MAX_WIDTH))  # GATED: width of a head's values
    gdn_conv_size: int = setting(4, up_to(1024))  # GATED: tokens that the short convolutions see


@dataclass
class ActionStreamConfig:
    """The action DiT: same depth and attention width as the video stream, its own width."""

    dim: int = setting(1024, up_to(MAX_WIDTH))  # width of its tokens
    ffn_dim: int = setting(4096, up_to(MAX_WIDTH))  # inner width of feed-forward layers
    action_dim: int = setting(14, up_to(MAX_WIDTH))  # of the policy's robot
    state_dim: int = setting(14, up_to(MAX_WIDTH))  # of the policy's robot


@dataclass
class ModelConfig:
    """Mixture-of-Transformers: `num_layers` layers of both streams, `num_heads` heads of `video.dim / num_heads`."""

    name: str = "kairos_4b"  # of the option, as in model=NAME
    num_layers: int = setting(32, up_to(1024))  # of each stream, a multiple of those in video.layer_cycle
    num_heads: int = setting(20, up_to(1024))  # of every layer of both streams
    text_dim: int = setting(2048, up_to(MAX_WIDTH))  # width of the contexts, the text encoder's
    freq_dim: int = setting(256, up_to(MAX_WIDTH))  # width of the sinusoidal timestep embedding
    eps: float = setting(1e-6, POSITIVE)  # of the normalisations
    video: VideoStreamConfig = field(default_factory=VideoStreamConfig)
    action: ActionStreamConfig | None = field(default_factory=ActionStreamConfig)  # null: video stream alone


@dataclass
class KernelsConfig:
    """Which implementation computes what; `auto` picks by device, and the choice is logged and saved."""

    # flex: trains on CUDA only; dense: masks of all pairs, the oracle, small sizes only
    attention: str = setting("auto", one_of("auto", "gathered", "flex", "dense"))
    gated_delta: str = setting("auto", one_of("auto", "torch", "fla"))  # fla: on CUDA only


@dataclass
class VideoEncoderConfig:
    """Frames -> latents. `wan` is the real Wan2.1 VAE from local weights, `tiny_vae` a small learned codec for demos,
    `block_dct` needs no weights."""

    kind: str = setting("wan", one_of("wan", "tiny_vae", "block_dct"))  # which encoder
    # wan: Diffusers folder or original .pth; tiny_vae: model.safetensors
    path: str | None = setting(None, path="exists")
    sample_posterior: bool = False  # wan: sample the posterior; false takes its mode (ours)


@dataclass
class TextEncoderConfig:
    """Prompt (and first frame) -> context. `hashed_ngrams` is weight-free; `qwen` the real VLM from local weights."""

    kind: str = setting("qwen", one_of("qwen", "hashed_ngrams"))  # which encoder
    path: str | None = setting(None, path="exists")  # qwen: model folder
    text_dim: int = setting(2048, up_to(MAX_WIDTH))  # width of the contexts, `model.text_dim`
    # longest sequence read, in tokens (qwen: the 97 that are cut off included)
    max_tokens: int = setting(1024, up_to(2**20))
    image: bool = True  # qwen: the first frame is read with the prompt (false: LIBERO-Plus)
    system_message: bool = True  # qwen: false as the public code has it: 97 tokens are cut all the same


@dataclass
class EncodersConfig:
    """What turns pictures and prompts into what the model reads."""

    name: str = "wan_qwen"  # of the option, as in encoders=NAME
    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)


@dataclass
class CaptionShare:
    """How often one of a sample's captions is taken, relative to the others, from the stage's start to its end."""

    name: str = "???"  # as in the index of the shards
    start: float = setting(1.0, NOT_NEGATIVE)  # share at the stage's start
    # share at its end, in between it changes linearly; null: it stays
    end: float | None = setting(None, NOT_NEGATIVE)


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

    name: str = "joint"  # of the option, as in stage=NAME
    streams: str = setting("joint", one_of("video", "joint"))  # joint: video and actions
    # probabilities, summing to 1
    conditions: dict[str, float] = setting(factory=lambda: {"ti2v": 1.0}, names=CONDITIONS)
    # the same, of samples of one frame
    image_conditions: dict[str, float] = setting(factory=lambda: {"t2i": 1.0}, names=IMAGE_CONDITIONS)
    captions: list[CaptionShare] = field(default_factory=list)  # empty: each sample's primary one
    history_frames: int = setting(1, NOT_NEGATIVE)  # K of conditions that give frames (ti2v, i2v)
    cfg_dropout: float = setting(0.1, FRACTION)  # of contexts, for guidance (ours)
    cfg_dropout_form: str = setting("zeros", one_of("zeros", "empty_prompt"))  # what a dropped context becomes
    loss_weighting: str = setting("bell", one_of("bell", "plain"))  # of noise levels; plain: all alike
    video_loss_weight: float = setting(1.0, NOT_NEGATIVE)  # ours
    action_loss_weight: float = setting(1.0, NOT_NEGATIVE)  # ours
    action_dim_weights: list[float] | None = None  # per action dimension, summing to 1; null: uniform
    action_shift: float = setting(5.0, POSITIVE)  # of the actions' noise schedule towards noise
    train_video: bool = True  # false: the video stream is frozen
    lora: LoraConfig = field(default_factory=LoraConfig)
    # checkpoint folder whose weights this stage starts from; null: fresh weights
    init_from: str | None = setting(None, on_resume="free", path="exists")
    # which weights of `init_from`; both: weights from raw, their average from ema (ours)
    init_weights: str = setting("ema", one_of("ema", "raw", "both"), on_resume="free")
    # action stream, when `init_from` has none (ours)
    action_init: str = setting("interpolate", one_of("interpolate", "random"))
    lr: float = setting(1e-4, POSITIVE)  # what optimizer.lr is unless given
    weight_decay: float = setting(1e-2, NOT_NEGATIVE)  # what optimizer.weight_decay is unless given


@dataclass
class OptimizerConfig:
    """The update, and the learning rate over the steps of a stage."""

    name: str = setting("adamw", one_of("adamw", "sgd"))  # sgd: plain, for comparing layouts
    lr: float = setting(1e-4, POSITIVE)  # after the warm-up
    weight_decay: float = setting(1e-2, NOT_NEGATIVE)  # not on norms, biases, A_log, dt_bias, modulations
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # of AdamW's moments
    eps: float = setting(1e-8, POSITIVE)  # of AdamW (ours)
    warmup_steps: int = setting(500, NOT_NEGATIVE)  # in which the learning rate rises linearly
    schedule: str = setting("constant", one_of("constant", "cosine"))  # after the warm-up
    min_lr_ratio: float = setting(0.0, FRACTION)  # cosine: last learning rate / lr (ours)
    gradient_clip: float = setting(1.0, POSITIVE)  # largest 2-norm of the whole gradient


@dataclass
class PrecisionConfig:
    """What is computed in fewer bits than `train.precision`."""

    fp8: Fp8Config = field(default_factory=Fp8Config)


@dataclass
class TrainConfig:
    """One stage's training: its length, its steps, and what is done between them."""

    # the stage's length: one of steps, epochs, samples and tokens (ours); checkpoints have names of eight digits
    steps: int | None = setting(1000, up_to(99_999_999))
    epochs: int | None = setting(None, POSITIVE)  # of all sources together
    samples: int | None = setting(None, POSITIVE)  # of all ranks
    tokens: int | None = setting(None, POSITIVE)  # of video and actions, as the model sees them
    micro_batch: int = setting(16, up_to(2**20))  # samples per rank and forward pass (published for LIBERO: 16)
    accumulation: int = setting(1, up_to(2**20))  # micro-batches per optimiser step (ours)
    precision: str = setting("bf16", one_of("bf16", "fp32"), on_resume="fixed")  # of weights and activations
    zero_stage: int = setting(1, one_of(0, 1, 2, 3))  # ranks share: 1 moments, 2 gradients, 3 weights too (ours)
    # parameters of fewer elements stay whole in ZeRO stage 3; DeepSpeed's own default
    stage3_param_persistence_threshold: int = setting(100_000, NOT_NEGATIVE)
    # elements that stage 3 keeps gathered for their next use; DeepSpeed's own default
    stage3_max_live_parameters: int = setting(1_000_000_000, NOT_NEGATIVE)
    device: str = setting("auto", one_of("auto", "cpu", "cuda"))  # auto: CUDA where there is one
    ema_decay: float = setting(0.999, FRACTION)  # of the moving average of the weights (ours)
    checkpoint_every: int = setting(500, POSITIVE)  # steps (ours)
    keep_last: int = setting(3, POSITIVE)  # checkpoints (ours)
    keep_every: int = setting(0, NOT_NEGATIVE)  # steps; 0: only the last ones (ours)
    keep_best: bool = True  # ours: also the one with the lowest validation loss
    log_every: int = setting(10, POSITIVE)  # steps (ours)
    validate_every: int = setting(500, NOT_NEGATIVE)  # steps; 0: never (ours)
    validation_batches: int = setting(4, POSITIVE)  # of micro_batch samples, by all ranks together (ours)
    # steps between sampled windows in TensorBoard; 0: never (ours)
    sample_every: int = setting(500, NOT_NEGATIVE)
    # skip: as `guard` says; stop: at the first non-finite loss or gradient norm (ours)
    on_nonfinite: str = setting("skip", one_of("stop", "skip"))
    # auto: from the newest checkpoint of run_dir when there is one (ours)
    resume: str = setting("auto", one_of("auto", "never", "must"))
    # of one device in this precision, for MFU; null: known devices only
    peak_tflops: float | None = setting(None, POSITIVE)
    # activations computed again in backward; selective: all but attention outputs and states (ours)
    recompute: str = setting("none", one_of("none", "block", "selective"))
    offload_activations: bool = False  # keep what is saved for backward in host memory (ours)
    async_checkpoint: bool = True  # write checkpoints behind the training loop (ours)
    # this many failed writes in a row are tolerated; the next one ends the run (ours)
    failed_checkpoints: int = setting(3, NOT_NEGATIVE)
    # local time as in 2026-01-31T18:00:00; the run saves and ends before it
    deadline: str | None = setting(None, on_resume="silent")
    deadline_margin: float = setting(300.0, up_to(10**9, least=0))  # seconds before the deadline (ours)
    dry_run: bool = True  # before the first step, one of the largest batch, whose update is dropped (ours)


@dataclass
class CurriculumStage:
    """A stage of an experiment: its name, and what it sets on top of the experiment's own settings."""

    name: str = "???"  # of the stage, and of its part of the run directory
    set: list[str] = field(default_factory=list)  # GROUP=OPTION and KEY=VALUE, as on the command line, which wins


@dataclass
class CurriculumConfig:
    """Stages that `kairos-train train` walks, each from the weights of the one before. Empty: the run is one stage."""

    stages: list[CurriculumStage] = field(default_factory=list)  # in the order in which they are trained
    first: str | None = None  # name of the stage to begin with; null: the first
    last: str | None = None  # name of the stage to end with; null: the last


@dataclass
class Config:
    """One run. Saved resolved as `config.yaml` with the run, every checkpoint and every export.

    Free to change when a run is resumed is how it is split, recomputed, watched and written: that changes its numbers
    by rounding alone. `train.micro_batch` and `train.accumulation` must then make up for another number of data ranks:
    `kairos_train.training.run_state` holds the samples of a step.
    """

    experiment: str = "custom"  # of the option, as in experiment=NAME
    seed: int = setting(0, NOT_NEGATIVE)  # of weights, noise, conditions and the order of the data
    run_dir: str = setting("runs/${experiment}/${stage.name}", on_resume="free", path="any")  # all that a run writes
    model: ModelConfig = field(default_factory=ModelConfig)
    kernels: KernelsConfig = setting(factory=KernelsConfig, on_resume="free")
    encoders: EncodersConfig = field(default_factory=EncodersConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage: StageConfig = field(default_factory=StageConfig)
    curriculum: CurriculumConfig = setting(factory=CurriculumConfig, on_resume="free")
    # kairos-train commands that make the data, each with --out
    prepare: list[str] = setting(factory=list, on_resume="free")
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = setting(factory=ParallelConfig, on_resume="free")
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    cluster: ClusterConfig = setting(factory=ClusterConfig, on_resume="free")
    train: TrainConfig = setting(factory=TrainConfig, on_resume="free")
    guard: GuardConfig = setting(factory=GuardConfig, on_resume="free")
    watch: WatchConfig = setting(factory=WatchConfig, on_resume="free")
    monitor: MonitorConfig = setting(factory=MonitorConfig, on_resume="free")
    faults: FaultsConfig = setting(factory=FaultsConfig, on_resume="free")


def stage_model(config: Config) -> ModelConfig:
    """The model that a stage trains and its checkpoints hold: a video stage has no action stream."""
    return replace(config.model, action=None) if config.stage.streams == "video" else config.model
