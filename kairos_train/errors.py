"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """Bad input: names the field, its value, the rule and the remedy, in one line.

    The command line prints it without a traceback and exits with code 2. Everything else that is raised is a fault of
    this project and keeps its traceback.
    """


class RunStopped(RuntimeError):
    """A run that stopped itself by policy (non-finite loss and the like). Printed as one line, exit code 3."""
