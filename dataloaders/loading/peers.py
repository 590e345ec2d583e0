"""Whether the processes that share a sample (tensor and context peers) have the same batches."""

from __future__ import annotations

from collections.abc import Iterable

from kairos_train.basics.errors import RunStopped


def check_same(gathered: Iterable[tuple[int, list[str]]]) -> None:
    """Compare what peers have read in a step.

    Args:
        gathered: data rank and digests of the step's batches, of every process by its number.

    Raises:
        RunStopped: processes of one data rank have different digests; the same on all processes.
    """
    by_rank: dict[int, dict[tuple[str, ...], list[int]]] = {}
    for process, (rank, digests) in enumerate(gathered):
        by_rank.setdefault(rank, {}).setdefault(tuple(digests), []).append(process)
    different = [
        f"of data rank {rank} " + ", ".join(f"{'+'.join(digests)} on {_named(who)}" for digests, who in alike.items())
        for rank, alike in sorted(by_rank.items())
        if len(alike) > 1
    ]
    if different:
        raise RunStopped(
            f"data.check_peers=true: processes that share samples have different batches: {'; '.join(different)}; "
            "compare the shards (data verify) and the settings of their machines"
        )


def _named(processes: list[int]) -> str:
    return f"rank{'s' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"
