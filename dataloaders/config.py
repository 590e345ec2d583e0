"""Settings of the data: windows, clips, sources, the loader. `kairos_train.config.schema` composes them."""

from __future__ import annotations

from dataclasses import dataclass, field

NORMALIZATIONS = ("minmax", "quantile", "zscore", "none")


@dataclass
class WindowConfig:
    """A training window cut from an episode: `frames` video frames, every `action_video_freq_ratio`-th raw frame.

    It spans (frames - 1) * ratio + 1 raw frames and as many actions less one. `stride` is the distance between the
    first raw frames of two windows. Keys of several columns joined by `+` mean these columns one behind the other.
    """

    frames: int = 9  # video frames, 4k + 1
    action_video_freq_ratio: int = 4
    stride: int = 1
    height: int = 224  # pixels: of one camera's picture side by side, of the whole picture in the other layout
    width: int = 224
    cameras: list[str] = field(default_factory=list)  # empty: every camera that has files, in name order
    layout: str = "side_by_side"  # side_by_side | head_over_wrists (three cameras: head, left wrist, right wrist)
    state_key: str = "observation.state"
    action_key: str = "action"
    action_values: str = "recorded"  # recorded | minus_state (absolute actions less the window's first state)
    absolute_dims: list[int] = field(default_factory=list)  # of actions: no deltas (gripper); kept, held in padding


@dataclass
class ClipConfig:
    """How plain videos and images become samples. Their sizes differ; each keeps its own aspect."""

    fps: float = 16.0  # slower videos keep their own
    short_side: int = 256  # pixels, as in 256p, 480p, 720p; cut down to a multiple of 32
    aspects: list[float] = field(default_factory=lambda: [1.0, 4 / 3, 16 / 9, 21 / 9])  # long side over short (ours)
    most_frames: int = 81  # 4k + 1; longer videos give several samples
    least_frames: int = 5  # 4k + 1; what is left of a video below that is left out and counted (ours)


@dataclass
class SourceConfig:
    """One of several sources that a run draws from."""

    shards: str = "???"  # folder written by `kairos-train data pack`
    weight: float | None = None  # share of the samples, relative to the others; null: the number of its samples
    max_epochs: int | None = None  # how often it may be repeated; null: without limit


@dataclass
class DataConfig:
    name: str = "custom"
    shards: str = "???"  # folder written by `kairos-train data pack`; the one source where `sources` is empty
    sources: list[SourceConfig] = field(default_factory=list)  # several sources, mixed
    temperature: float = 1.0  # weights of sources to the power 1 / temperature: above 1 evens their shares out
    validation_shards: str | None = None
    window: WindowConfig = field(default_factory=WindowConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    prompt_template: str = "{task}"
    normalize_action: str = "minmax"  # minmax | quantile | zscore | none
    normalize_state: str = "minmax"
    workers: int = 2  # loader processes per data-parallel rank; 0 loads in the training process
    streams: int | None = None  # interleaved parts of an epoch; null: 2^n by the number of shards, at most 64 (ours)
    shuffle_buffer: int = 1000  # most places by which a sample is moved within its stream
    tokens_per_micro_batch: int | None = None  # video tokens; null: train.micro_batch samples of one shape
    on_corrupt: str = "stop"  # stop | skip: what an unreadable shard or sample does
    max_corrupt: float = 0.01  # skip: share of all samples from which the run stops (ours)
    cache_dir: str = "runs/shard_cache"  # copies of shards that are named by URL (ours)
    cache_gb: float = 100.0  # what the copies may take on one machine (ours)
    timeout: float = 600.0  # seconds after which a silent loader process counts as hung (ours)
    check_peers: bool = False  # every step, compare the batches of processes that share samples (ours)
