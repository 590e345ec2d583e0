"""What ranks tell of themselves (beats), what is found out about them (findings), and how it is put into words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from kairos_train.basics.errors import EXIT_CODES, MachineFault
from kairos_train.operations.watch.members import STATE_WORDS, Member

FAULT_CODE = EXIT_CODES[MachineFault]
NAMED = 8  # most ranks that are named one by one


@dataclass(frozen=True)
class Heartbeat:
    """A heartbeat.

    Attributes:
        number: counts up with every beat.
        step, phase: where the training loop is.
        place: how often it has told so within this step: what comes later has more.
        seconds: since it told so last.
        line: what the main thread executes, as `function (file:line)`.
        patient: it is in a phase that may take longer, and within its limit.
        gone: it has ended on purpose.
    """

    number: int
    step: int = 0
    phase: str = "start"
    place: int = 0
    seconds: float = 0.0
    line: str = ""
    patient: bool = False
    gone: bool = False

    def encode(self) -> str:
        return json.dumps(list(asdict(self).values()))

    @staticmethod
    def decode(text: bytes) -> Heartbeat:
        return Heartbeat(*json.loads(text))

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" + (f", at {self.line}" if self.line else "")


@dataclass(frozen=True)
class RunFault:
    """Why a run cannot go on.

    Attributes:
        kind: died (a process), silent (machines), failed (a rank, by an error of its own) or stuck; end: none of these,
            rank 0 has ended on purpose.
        text: who and what, in words.
        code: the exit code of all.
    """

    kind: str
    text: str = ""
    code: int = FAULT_CODE

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: bytes) -> RunFault:
        return RunFault(**json.loads(text))

    def error(self) -> Exception:
        """What the main thread raises to end with the code and the words of this finding."""
        kind = next((kind for kind, code in EXIT_CODES.items() if code == self.code), MachineFault)
        return kind(self.text + self.remedy)

    @property
    def remedy(self) -> str:
        return "; start the run again, it continues from its newest checkpoint" if self.code == FAULT_CODE else ""


def died(members: Sequence[Member], beats: Mapping[int, Heartbeat], *, how: str = "") -> RunFault:
    """Processes that have ended without a word."""
    last = beats.get(members[0].rank)
    where = f", last heard of in {last}" if last else ""
    return RunFault("died", f"{named(members)} died{where}{how}")


def silent_hosts(members: Sequence[Member], *, seconds: float, state: str | None = None) -> RunFault:
    """Machines of which nothing is heard any more."""
    why = f": {STATE_WORDS[state]}" if state in STATE_WORDS else "; machine, network or all its processes are down"
    return RunFault("silent", f"{named(members)} has not been heard of for {seconds:.0f} s{why}")


def stuck(
    roster: Sequence[Member],
    beats: Mapping[int, Heartbeat],
    *,
    silent: Sequence[int],
    seconds: float,
    state: Callable[[Member], str | None],
) -> RunFault:
    """Who holds the others up: who is silent, else who is behind in the loop, else whose code is not where most are.

    Args:
        roster: all ranks, by rank.
        beats: of all ranks that have not ended, by rank.
        silent: ranks whose heartbeats have stopped.
        seconds: without progress.
        state: of a process, where it can be seen.
    """
    behind = list(silent) or _behind(beats)
    others = [rank for rank in beats if rank not in behind]
    if not behind:
        example = next(iter(beats.values()))
        return RunFault("stuck", f"all ranks are stuck in {example} for {seconds:.0f} s; none is behind the others")
    members, beat = [roster[rank] for rank in behind], beats[behind[0]]
    word = STATE_WORDS.get(state(members[0]) or "")
    what = f"is silent, last heard of in {beat}" if silent else f"is stuck in {beat}"
    waiting = f", while {named([roster[rank] for rank in others])} wait in {beats[others[0]]}" if others else ""
    end = "; it cannot end by itself: the launcher kills it" if silent else ""
    return RunFault(
        "stuck", f"{named(members)} {what}{f' ({word})' if word else ''}{waiting}; no progress for {seconds:.0f} s{end}"
    )


def _behind(beats: Mapping[int, Heartbeat]) -> list[int]:
    """Ranks at the earliest place of the loop; when all are at the same, those whose code is where the fewest are."""
    if len(beats) == 1:
        return list(beats)
    first = min((beat.step, beat.place) for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if (beat.step, beat.place) == first]
    if len(behind) < len(beats):
        return behind
    lines = Counter(beat.line for beat in beats.values()).most_common()
    odd = [rank for rank, beat in beats.items() if beat.line != lines[0][0]]
    return odd if 2 * len(odd) < len(beats) else []


def named(members: Sequence[Member]) -> str:
    """Ranks in words: the first few one by one, the others by their number."""
    text = ", ".join(map(str, members[:NAMED]))
    return text + (f" and {len(members) - NAMED} more" if len(members) > NAMED else "")
