"""The device that a setting or option means."""

from __future__ import annotations

from kairos_train.basics.errors import UserError


def device_of(name: str) -> str:
    """`auto` resolved: a GPU where there is one.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda is asked for but torch sees no GPU; use cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name
