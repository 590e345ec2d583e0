"""The ways in which a command ends on purpose, each with its exit code.

    0    done
    1    it ran, and what it checked does not hold
    2    bad input (`UserError`)
    3    a run stopped itself by policy (`RunStopped`): look before starting it again
    4    a machine, a process or a disk failed (`MachineFault`): start it again
    75   interrupted on request, checkpoint written (`Interrupted`): start it again
    130  interrupted at the terminal; a run has then written its checkpoint (`InterruptedAtTerminal`)

Anything else that is raised is a fault of this project and keeps its traceback.

Their messages are shown, logged and written to files: they never hold the secrets of a URL (`basics.secrets`).
"""

from kairos_train.basics.secrets import redacted


class _Shown(Exception):
    def __init__(self, *args: object) -> None:
        super().__init__(*(redacted(arg) if isinstance(arg, str) else arg for arg in args))


class UserError(_Shown, ValueError):
    """Bad input: names the field, its value, the rule and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2.
    """


class RunStopped(_Shown, RuntimeError):
    """A run that stopped itself by policy (bad steps beyond the budget). Printed as one line, exit code 3."""


class MachineFault(_Shown, RuntimeError):
    """Something that the run does not master failed: a process, a machine, a disk. One line, exit code 4.

    Starting the command again continues from the newest valid checkpoint.
    """


class Interrupted(_Shown, RuntimeError):
    """A run that ended because it was asked to, with a checkpoint of its last step. One line, exit code 75.

    75 is `EX_TEMPFAIL` of sysexits.h. Starting the command again continues.
    """


class InterruptedAtTerminal(Interrupted):
    """As `Interrupted`, by Ctrl-C: no job is to start it again by itself. Exit code 130."""


EXIT_CODES: dict[type[Exception], int] = {
    UserError: 2,
    RunStopped: 3,
    MachineFault: 4,
    InterruptedAtTerminal: 130,
    Interrupted: 75,
}
"""By the first that an error is an instance of."""


def one_line(error: BaseException) -> str:
    """What an exception says, without line breaks and secrets; its type where it says nothing."""
    return redacted(" ".join(str(error).split())) or type(error).__name__


def shown(value: object, *, most: int = 80) -> str:
    """A value for a message of one line: cut where it is long, escaped where it is not printable."""
    try:
        text = str(value)
    except ValueError:  # Python writes no integers that are as long
        return "an integer of more than 4,300 digits"
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[:most]}…"
