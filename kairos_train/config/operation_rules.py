"""Rules of what keeps a run going: deadline, guard, watch, faults."""

from __future__ import annotations

from datetime import datetime

from kairos_train.basics.errors import UserError
from kairos_train.config.schema import Config


def deadline_is_a_time(config: Config) -> None:
    deadline = config.train.deadline
    if deadline is None:
        return
    try:
        datetime.fromisoformat(deadline)
    except ValueError:
        raise UserError(f"train.deadline={deadline} is no time; give one as in 2026-01-31T18:00:00, or null") from None


def guard_sees_enough(config: Config) -> None:
    guard = config.guard
    if guard.skips >= guard.window:
        raise UserError(
            f"guard.skips={guard.skips} within guard.window={guard.window} steps would never be exceeded; "
            f"use {guard.window - 1} or fewer"
        )
    if guard.spike_factor is not None and guard.spike_factor <= 1:
        raise UserError(
            f"guard.spike_factor={guard.spike_factor} takes half of the steps for spikes; give more than 1, or null"
        )


def silence_is_longer_than_heartbeats(config: Config) -> None:
    watch = config.watch
    if watch.silence < 3 * watch.heartbeat:
        raise UserError(
            f"watch.silence={watch.silence} is less than three heartbeats of watch.heartbeat={watch.heartbeat} s; "
            f"use {3 * watch.heartbeat} or more"
        )


def faults_count_from_one(config: Config) -> None:
    for i, fault in enumerate(config.faults.inject):
        if fault.step < 1 or fault.steps < 1 or fault.rank < 0 or (fault.life is not None and fault.life < 1):
            raise UserError(f"faults.inject[{i}]: step, steps and life count from 1 and rank from 0; fix {fault}")
        if not fault.seconds > 0:
            raise UserError(f"faults.inject[{i}].seconds={fault.seconds} is not positive; give a number above 0")
