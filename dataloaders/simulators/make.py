"""Simulators by name."""

from __future__ import annotations

from dataloaders.simulators.base import Simulator, check_task
from kairos_train.basics.errors import UserError


def make(env: str, task: str | None = None, size: int = 128) -> Simulator:
    """A simulator by name, with pictures of `size` x `size` pixels.

    Raises:
        UserError: unknown environment or task, a size that video cannot hold, packages or GL libraries missing.
    """
    task = check_task(env, task)
    if size < 16 or size % 2:
        raise UserError(f"size is {size}; pictures must be an even number of pixels wide, 16 or more")
    if env == "push2d":
        from dataloaders.simulators.push2d import Push2D

        return Push2D(task, size)
    from dataloaders.simulators.metaworld import MetaWorld

    return MetaWorld(task, size)
