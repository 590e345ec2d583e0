"""Rules of what Slurm is asked for."""

from __future__ import annotations

import re

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config

DERIVED = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("PYTHONPATH", "PYTHONSAFEPATH"),
)
"""Variables that a job's launch decides."""


WORD = r"[^\s\"'\\#]+"
"""What may stand behind an option of sbatch in a script."""


def seconds_of(time_limit: str) -> int:
    """Seconds of H:MM:SS or D-HH:MM:SS.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d{1,3}):([0-5]\d):([0-5]\d)", time_limit, re.ASCII)
    if not match:
        raise ValueError(time_limit)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def time_limit_is_a_time(config: Config) -> None:
    """Slurm takes a bare number for minutes, which nobody expects of one that YAML made of 24:00:00."""
    limit = config.cluster.time_limit
    if limit is None:
        return
    try:
        seconds_of(limit)
    except ValueError:
        raise UserError(
            f'cluster.time_limit={limit} is no time; give H:MM:SS or D-HH:MM:SS, as "24:00:00" in quotes, or null'
        ) from None


def time_limit_leaves_time(config: Config) -> None:
    """A job that is told to stop as soon as it begins would be put into the queue for ever."""
    if config.cluster.time_limit is None:
        return
    try:
        limit = seconds_of(config.cluster.time_limit)
    except ValueError:
        return  # another rule's
    for key, value in (
        ("cluster.signal_seconds", config.cluster.signal_seconds),
        ("train.deadline_margin", config.train.deadline_margin),
    ):
        if limit <= value:
            raise UserError(
                f"cluster.time_limit={config.cluster.time_limit} is no longer than {key}={value:g} seconds, at which "
                "the run saves and ends; raise the one or lower the other"
            )


def names_are_words(config: Config) -> None:
    """sbatch reads the options in a script by rules of its own: what it would cut or end there is refused."""
    cluster = config.cluster
    for name in ("partition", "account", "qos", "memory_per_cpu"):
        value = getattr(cluster, name)
        if value is not None and not re.fullmatch(WORD, value):
            raise UserError(f"cluster.{name}={value!r}: an option of sbatch is a word without spaces, quotes, \\ or #")


def options_are_options(config: Config) -> None:
    for key, options in (("cluster.sbatch", config.cluster.sbatch), ("cluster.srun", config.cluster.srun)):
        for option in options:
            if not re.fullmatch(rf"--[a-z][a-z-]*(={WORD})?", option):
                raise UserError(
                    f"{key} holds {option!r}; write --OPTION or --OPTION=VALUE, without spaces, quotes or #"
                )


def environment_has_names(config: Config) -> None:
    for name in config.cluster.environment:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"cluster.environment holds {name!r}; a variable has a name of letters, digits and _")
        if name in DERIVED:
            raise UserError(f"cluster.environment holds {name}, which is derived from the job; remove it")


def container_or_venv(config: Config) -> None:
    cluster = config.cluster
    if cluster.container is not None and cluster.venv is not None:
        raise UserError(
            f"cluster.container={cluster.container} and cluster.venv={cluster.venv}: a job runs in one of them; "
            "set the other to null"
        )
    if cluster.container is None and cluster.container_mounts:
        raise UserError(
            f"cluster.container_mounts={cluster.container_mounts} without cluster.container; name the image, or set "
            "cluster.container_mounts=[]"
        )
    if cluster.container is not None and re.search("[,:]", cluster.scratch):
        raise UserError(f"cluster.scratch={cluster.scratch}: a container sees no folder with , or : in its name")
    for mount in cluster.container_mounts:
        if not re.fullmatch(r"[^\s,:]+:[^\s,:]+(:[a-z,+]+)?", mount):
            raise UserError(f"cluster.container_mounts holds {mount!r}; write HOST:CONTAINER")
