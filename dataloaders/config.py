"""Settings of the data: windows, clips, sources, the loader. `kairos_train.config.schema` composes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from kairos_train.basics.setting import FRACTION, NOT_NEGATIVE, POSITIVE, SECONDS, one_of, setting, up_to

NORMALIZATION = one_of("minmax", "quantile", "zscore", "none")
MAX_SIDE, MAX_FRAMES = 8192, 2**16 + 1  # pixels and video frames of a sample, which is held in memory whole
MIN_RANGE = 1e-4  # a dimension of states or actions whose range is below never moves


@dataclass
class WindowConfig:
    """A training window cut from an episode: `frames` video frames, every `action_video_freq_ratio`-th raw frame.

    It spans (frames - 1) * ratio + 1 raw frames and as many actions less one. `stride` is the distance between the
    first raw frames of two windows. Keys of several columns joined by `+` mean these columns one behind the other.
    """

    frames: int = setting(9, up_to(MAX_FRAMES))  # video frames, 4k + 1
    action_video_freq_ratio: int = setting(4, POSITIVE)  # raw frames per video frame; every raw frame has an action
    stride: int = setting(1, POSITIVE)  # raw frames between the beginnings of two windows (ours)
    # pixels: of one camera's picture side by side, of the whole picture in the other layout
    height: int = setting(224, up_to(MAX_SIDE))
    width: int = setting(224, up_to(MAX_SIDE))  # pixels, as `height`
    cameras: list[str] = field(default_factory=list)  # empty: every camera that has files, in name order
    # head_over_wrists: three cameras, in the order head, left wrist, right wrist
    layout: str = setting("side_by_side", one_of("side_by_side", "head_over_wrists"))
    state_key: str = "observation.state"  # columns of the state
    action_key: str = "action"  # columns of the actions
    # minus_state: absolute actions less the window's first state
    action_values: str = setting("recorded", one_of("recorded", "minus_state"))
    absolute_dims: list[int] = field(default_factory=list)  # of actions: no deltas (gripper); kept, held in padding


@dataclass
class ClipConfig:
    """How plain videos and images become samples. Their sizes differ; each keeps its own aspect."""

    fps: float = setting(16.0, POSITIVE)  # frames per second; slower videos keep their own
    short_side: int = setting(256, up_to(MAX_SIDE))  # pixels, as in 256p, 480p, 720p; cut down to a multiple of 32
    aspects: list[float] = field(default_factory=lambda: [1.0, 4 / 3, 16 / 9, 21 / 9])  # long side over short (ours)
    most_frames: int = setting(81, up_to(MAX_FRAMES))  # 4k + 1; longer videos give several samples
    # 4k + 1; what is left of a video below that is left out and counted (ours)
    least_frames: int = setting(5, up_to(MAX_FRAMES))


@dataclass
class LimitsConfig:
    """What files of others may hold and name; others are refused, and left out with `--on-bad skip` (ours).

    With the defaults, a small file takes no more than a gigabyte of memory, whatever it says of itself. What is really
    there may cost more: a row of a manifest about a kilobyte.
    """

    image_pixels: int = setting(8192 * 8192, POSITIVE)  # of an image
    video_pixels: int = setting(4096 * 4096, POSITIVE)  # of a frame of a video, stored and as it is shown
    frames: int = setting(2_000_000, POSITIVE)  # of a video file; at 30 fps, 18 hours
    member_mb: float = setting(512.0, POSITIVE)  # of a sample's members in a tar, and of a video or image by URL
    # of a parquet file in memory, where texts and inline images count twice; of a manifest, of a file of JSON lines
    table_mb: float = setting(320.0, POSITIVE)
    episodes: int = setting(500_000, POSITIVE)  # of a LeRobot dataset
    text_characters: int = setting(20_000, POSITIVE)  # of a caption
    json_mb: float = setting(16.0, POSITIVE)  # of one JSON value, like a line of a manifest
    json_depth: int = setting(32, POSITIVE)  # of its objects and lists in each other
    # folders, or beginnings of URLs, in which a dataset may name files beside its own folder
    allowed_roots: list[str] = field(default_factory=list)

    @property
    def member_bytes(self) -> int:
        return int(self.member_mb * 1e6)

    @property
    def table_bytes(self) -> int:
        return int(self.table_mb * 1e6)

    @property
    def json(self) -> dict[str, int]:
        """As `parse_json` takes them."""
        return {"most_bytes": int(self.json_mb * 1e6), "depth": self.json_depth}


BELIEVABLE: dict[str, tuple[str, ...]] = {
    "episodes": ("table",),
    "fps": ("info", "timestamps"),
    "order": ("frame_index", "timestamps", "rows"),
    "frames": ("frame_index", "timestamps"),
    "episode_index": ("file",),
    "video_parts": ("table",),
    "task": ("rows", "episodes"),
}
"""The sides of each contradiction that `data.believe` can decide."""


@dataclass
class BelieveConfig:
    """Which side is right where two sources within a LeRobot dataset contradict each other; null: packing refuses."""

    # table: pack its episodes, though info.json promises another number of them
    episodes: str | None = setting(None, one_of(*BELIEVABLE["episodes"]))
    fps: str | None = setting(None, one_of(*BELIEVABLE["fps"]))  # of the rows, by info.json or their timestamps
    # of the rows of an episode: by frame_index, by timestamps, or as they lie
    order: str | None = setting(None, one_of(*BELIEVABLE["order"]))
    frames: str | None = setting(None, one_of(*BELIEVABLE["frames"]))  # which frame of its video a row shows
    # file: its name says whose rows it holds, whatever their episode_index
    episode_index: str | None = setting(None, one_of(*BELIEVABLE["episode_index"]))
    # table: episodes share frames of one video, as their from_timestamp and to_timestamp say
    video_parts: str | None = setting(None, one_of(*BELIEVABLE["video_parts"]))
    # the instruction, by the task_index of the rows or by the table of episodes
    task: str | None = setting(None, one_of(*BELIEVABLE["task"]))


@dataclass
class SourceConfig:
    """One of several sources that a run draws from."""

    shards: str = setting("???", path="any")  # folder written by `kairos-train data pack`
    # share of the samples, relative to the others; null: the number of its samples
    weight: float | None = setting(None, NOT_NEGATIVE)
    max_epochs: int | None = None  # how often it may be repeated; null: without limit


@dataclass
class DataConfig:
    """What a run is trained on, and how its loader reads it."""

    name: str = "custom"  # of the option, as in data=NAME
    # folder written by `kairos-train data pack`; the one source where `sources` is empty
    shards: str = setting("???", path="any")
    sources: list[SourceConfig] = field(default_factory=list)  # several sources, mixed
    # weights of sources to the power 1 / temperature: above 1 evens their shares out (ours)
    temperature: float = setting(1.0, POSITIVE)
    validation_shards: str | None = setting(None, on_resume="free", path="any")  # folder of held-out windows
    window: WindowConfig = field(default_factory=WindowConfig)
    clips: ClipConfig = field(default_factory=ClipConfig)
    # seconds a row's timestamp may lie from its frame, as LeRobot has it
    timestamp_tolerance: float = setting(1e-4, POSITIVE, on_resume="silent")
    limits: LimitsConfig = setting(factory=LimitsConfig, on_resume="free")  # of what files of others may do
    # which side is right where a LeRobot dataset contradicts itself
    believe: BelieveConfig = setting(factory=BelieveConfig, on_resume="silent")
    prompt_template: str = "{task}"  # of the text a sample is conditioned on; {task} is its instruction
    normalize_action: str = setting("minmax", NORMALIZATION)  # of actions, by the statistics of their source
    normalize_state: str = setting("minmax", NORMALIZATION)  # of states, likewise
    # loader processes per data-parallel rank; 0 loads in the training process (ours)
    workers: int = setting(2, up_to(1024, least=0), on_resume="free")
    # interleaved parts of an epoch; null: 2^n by the number of shards, at most 64 (ours)
    streams: int | None = setting(None, POSITIVE)
    shuffle_buffer: int = setting(1000, POSITIVE)  # most places by which a sample is moved within its stream (ours)
    # video tokens; null: train.micro_batch samples of one shape
    tokens_per_micro_batch: int | None = setting(None, POSITIVE)
    # what an unreadable shard or sample does (ours)
    on_corrupt: str = setting("stop", one_of("stop", "skip"), on_resume="free")
    # on_corrupt=skip: share of all samples from which the run stops (ours)
    max_corrupt: float = setting(0.01, FRACTION, on_resume="free")
    # copies of shards that are named by URL (ours)
    cache_dir: str = setting("runs/shard_cache", on_resume="free", path="any")
    cache_gb: float = setting(100.0, POSITIVE, on_resume="free")  # what the copies may take on one machine (ours)
    # seconds after which a silent loader process counts as hung (ours)
    timeout: float = setting(600.0, SECONDS, on_resume="free")
    # seconds of waiting for one step's data from which it is logged (ours)
    log_wait: float = setting(30.0, SECONDS, on_resume="free")
    # every step, compare the batches of processes that share samples (ours)
    check_peers: bool = setting(False, on_resume="free")


READING = (
    *("data.window", "data.clips", "data.prompt_template"),
    *("data.believe", "data.timestamp_tolerance", "data.limits"),
)
"""What decides how a source is read, of the settings of a run."""
