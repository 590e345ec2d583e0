"""How a node's processes ended, as one exit code: what the job does next hangs on it."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

AGAIN = (4, 75)
"""Exit codes that mean: start me again (see `kairos_train.basics.errors`)."""

MACHINE_FAULT, INTERRUPTED = AGAIN

ASKED = (-signal.SIGTERM, -signal.SIGUSR1)
"""How a process ends that is asked to while it does not listen: as it starts, or when it is done."""


@dataclass(frozen=True)
class Ended:
    """Attributes:
    code: exit code; negative: the number of the signal that ended it.
    time: when it was seen, in whole seconds since 1970.
    """

    code: int
    time: int


def exit_code(ranks: Mapping[int, Ended]) -> int:
    """One exit code for all: that of those who ended first, for the others end because of them.

    A process that was ended by a signal (SIGKILL by the kernel that has no memory left, SIGSEGV, SIGBUS) is a fault of
    the machine: 4. SIGTERM and SIGUSR1 ask it to end: 75. Of several codes in the same second, one that does not ask to
    be started again counts before 4, and 4 before 75.

    Args:
        ranks: rank → its end, of those that did not end with 0.
    """
    if not ranks:
        return 0
    begin = min(end.time for end in ranks.values())
    codes = [INTERRUPTED if end.code in ASKED else end.code for end in ranks.values() if end.time == begin]
    if any(code < 0 for code in codes):
        return MACHINE_FAULT
    final = sorted(code for code in codes if code not in AGAIN)
    return final[0] if final else min(codes)


def describe(rank: int, ended: Ended) -> str:
    """ "rank 3: exit code 4", or "rank 3: SIGKILL"."""
    if ended.code >= 0:
        return f"rank {rank}: exit code {ended.code}"
    try:
        return f"rank {rank}: {signal.Signals(-ended.code).name}"
    except ValueError:
        return f"rank {rank}: signal {-ended.code}"
