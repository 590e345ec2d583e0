"""Settings of where a run goes and of what keeps it going: machines, bad steps, watch, measurements, faults.

A part of `kairos_train.config.schema`, whose rules hold here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kairos_train.basics.setting import NOT_NEGATIVE, POSITIVE, SECONDS, one_of, setting, up_to


@dataclass
class ClusterConfig:
    """A cluster: what `kairos-train plan` assumes of it, and how `kairos-train submit` asks Slurm for its machines.

    Bandwidths are what one GPU gets in one direction. On machines without GPUs (`train.device=cpu`) `gpus_per_node` is
    the number of processes per machine. What `submit` uses and a site decides is ours.
    """

    name: str = "h200"  # of the option, as in cluster=NAME
    gpus_per_node: int = setting(8, up_to(1024))  # of each machine
    memory_gb: float = setting(141.0, POSITIVE)  # of one GPU
    peak_tflops: float = setting(989.0, POSITIVE)  # dense bf16
    mfu: float = setting(0.4, POSITIVE)  # share of the peak that model FLOPs reach (ours)
    intra_node_gb_per_s: float = setting(450.0, POSITIVE)  # between GPUs of a machine
    inter_node_gb_per_s: float = setting(50.0, POSITIVE)  # between machines
    nodes: int = setting(1, up_to(2**20))  # of a training job
    partition: str | None = None  # null: Slurm's default
    account: str | None = None  # that a job is charged to; null: Slurm's default
    qos: str | None = None  # quality of service; null: Slurm's default
    time_limit: str | None = "24:00:00"  # of each life of a job: H:MM:SS or D-HH:MM:SS; null: the partition's
    signal_seconds: int = setting(300, SECONDS)  # before the time limit, Slurm sends SIGUSR1 to training
    max_restarts: int = setting(50, NOT_NEGATIVE)  # how often a job puts itself into the queue again
    exclusive: bool = False  # no other jobs on the machines of a training job
    gpus_option: str = setting("gpus-per-node", one_of("gpus-per-node", "gres", "none"))  # how GPUs are asked for
    cpus_per_gpu: int = setting(8, up_to(1024))  # cores for each process, its loader's included
    memory_per_cpu: str | None = None  # as 4G; null: the partition's
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, as [--constraint=h200]
    srun: list[str] = field(default_factory=list)  # further options of srun
    environment: dict[str, str] = field(default_factory=dict)  # variables of all processes: NCCL's, and the site's own
    healthcheck: bool = True  # of all machines, before each life of a training job
    # image of pyxis/enroot, a file or REGISTRY#IMAGE:TAG; null: a virtual environment
    container: str | None = setting(None, path="any")
    container_mounts: list[str] = setting(factory=list, path="any")  # as HOST:CONTAINER, besides the working directory
    # folder of a virtual environment that all machines see; null: the one that submits
    venv: str | None = setting(None, path="any")
    scratch: str = setting("/tmp", path="any")  # folder of each machine's own, for the job's copy of the code
    jobs_dir: str = setting("runs/jobs", path="any")  # folder that all machines see: scripts, code and logs of jobs


@dataclass
class GuardConfig:
    """What becomes of bad steps: those with a non-finite loss or gradient norm, and loss spikes. All values ours.

    A bad step's update is dropped. More than `skips` of them within `window` steps: the run goes back to the newest
    checkpoint from before the first of them and steps over the data up to here. After `rollbacks` of those it stops.
    """

    window: int = setting(100, POSITIVE)  # steps
    skips: int = setting(10, NOT_NEGATIVE)  # bad steps within the window that are only dropped
    rollbacks: int = setting(2, NOT_NEGATIVE)  # how often a run goes back, in all its lives
    # a loss above this times the median of the window's; null: spikes are not sought
    spike_factor: float | None = setting(10.0, POSITIVE)


@dataclass
class WatchConfig:
    """How processes watch each other and themselves. Seconds; all values ours."""

    heartbeat: float = setting(1.0, SECONDS)  # between two signs of life of a process
    silence: float = setting(20.0, SECONDS)  # without a heartbeat of any process of a machine: it is taken for dead
    stuck: float = setting(1800.0, SECONDS)  # without progress of the training loop: stacks are written, the run ends


@dataclass
class MonitorConfig:
    """What is measured beside training. All values ours."""

    timed_steps: bool = True  # time collectives, and take gradient norms by block kind, in the last step of each report
    straggler_factor: float = setting(1.3, POSITIVE)  # a process busy for longer than this times the median is told
    # first step of a profiler window; SIGUSR2 opens one at any time
    profile_at: int | None = setting(None, POSITIVE)
    profile_steps: int = setting(3, POSITIVE)  # of a profiler window
    log_samples: bool = False  # which samples each step had, in samples/rank-….jsonl
    # text file for node_exporter's textfile collector; null: none
    prometheus_file: str | None = setting(None, path="any")


@dataclass
class FaultConfig:
    """A fault that is made on purpose, for tests of what a run survives."""

    # what happens; stall: of the loader
    kind: str = setting("???", one_of("kill", "hang", "raise", "nan", "spike", "slow", "stall"))
    step: int = 1  # during this step, counted from 1
    rank: int = 0  # of the world; nan and spike: of the data-parallel ranks
    life: int | None = 1  # of the run, counted from 1; null: in each
    steps: int = 1  # for this many steps (nan, spike, slow)
    seconds: float = 1.0  # slow, stall


@dataclass
class FaultsConfig:
    """Faults on purpose."""

    inject: list[FaultConfig] = field(default_factory=list)  # empty: none
