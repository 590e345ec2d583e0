"""A run into a checkpoint and back: weights, moments, averages, random states, position in the data, configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dataloaders.config import DataConfig
from dataloaders.loading.loader import ShardLoader
from kairos_train.basics.errors import MachineFault, UserError
from kairos_train.basics.log import logger
from kairos_train.basics.secrets import redacted_values
from kairos_train.checkpoint.canonical import CheckpointReader, find_latest, list_checkpoints
from kairos_train.checkpoint.retention import prune
from kairos_train.checkpoint.saver import Saver
from kairos_train.checkpoint.writing import whole_pieces
from kairos_train.conditioning.interfaces import identities_match
from kairos_train.config.compose import load_saved
from kairos_train.config.keys import on_resume
from kairos_train.config.schema import TrainConfig
from kairos_train.inference.robots import ROBOTS_FILE, to_json
from kairos_train.operations.guard import Guard
from kairos_train.training.budget import Progress
from kairos_train.training.engine.deepspeed_engine import TrainingEngine
from kairos_train.training.engine.ema import Ema
from kairos_train.training.engine.engine_state import load_full_state, state_pieces
from kairos_train.training.engine.random_state import derive_random_state, random_state, set_random_state
from kairos_train.training.inputs.feed import Feed
from kairos_train.training.measure.telemetry import LOSSES
from parallel.topology import Topology


@dataclass(frozen=True)
class Best:
    """The step with the lowest validation loss of the averaged weights; its checkpoint is kept."""

    step: int
    loss: float


def find_resumable(run_dir: str, *, resume: str) -> tuple[CheckpointReader | None, list[str]]:
    """The checkpoint to continue from, and warnings about damaged ones. Looks at names and sizes.

    Args:
        resume: `train.resume`.

    Raises:
        UserError: `must` without a checkpoint, checkpoints of which none is valid, or any under `never`.
        MachineFault: the folder cannot be listed.
    """
    folder = checkpoints(run_dir)
    if resume == "never":
        if list_checkpoints(folder):
            raise UserError(
                f"train.resume=never: run_dir={run_dir} holds checkpoints; choose another run_dir or resume=auto"
            )
        return None, []
    path, problems = find_latest(folder)
    if path is None:
        refuse_to_begin(folder, problems, resume=resume)
    return (None if path is None else CheckpointReader(path)), problems


def refuse_to_begin(folder: Path, problems: Sequence[str], *, resume: str) -> None:
    """Return if a run without a checkpoint to continue from may begin at step 0.

    Where there are some, and all are damaged, it would write over what may still be saved.

    Args:
        problems: one warning for each damaged one.
        resume: `train.resume`.

    Raises:
        UserError: it may not.
    """
    if problems:
        more = f", and {len(problems) - 1} more like it" if len(problems) > 1 else ""
        raise UserError(
            f"train.resume={resume}: no valid checkpoint in {folder}: {problems[0]}{more}; nothing there was touched:"
            " restore one of them, or move that folder away to begin at step 0"
        )
    if resume == "must":
        raise UserError(f"train.resume=must: no checkpoint in {folder}; use resume=auto")


def checkpoints(run_dir: str) -> Path:
    """Where a run's checkpoints are."""
    return Path(run_dir) / "checkpoints"


def changed_settings(settings: Mapping[str, Any], reader: CheckpointReader) -> list[str]:
    """Settings that differ from the checkpoint's, "key old -> new", all of them free to change.

    Args:
        settings: all of this run, as nested mappings.

    Raises:
        UserError: one that is not; naming it.
    """
    # What is saved has no secrets; a signature that was renewed is no other setting.
    old, new = (_leaves(redacted_values(s)) for s in (asdict(load_saved(reader.path / "config.yaml")), settings))
    changes = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    for key in changes:
        if on_resume(key) == "fixed":
            raise UserError(
                f"{key}={new.get(key)}: the run in run_dir={settings['run_dir']} was started with {old.get(key)}; "
                "set that to resume it, or choose another run_dir"
            )
    return [f"{key} {old.get(key)} -> {new.get(key)}" for key in changes if on_resume(key) == "free"]


@dataclass
class RunState:
    """What a checkpoint holds of a run.

    Attributes:
        settings: the run's `config.yaml`.
        kernels: what computes what (`chosen_kernels`).
        step_size: what a step takes from the data (`step_size`).
        seed: of the run.
        best: the step with the lowest validation loss so far.
        guard: memory of bad steps.
    """

    engine: TrainingEngine
    ema: Ema
    loader: ShardLoader
    feed: Feed
    settings: str
    kernels: dict[str, str]
    step_size: int
    seed: int
    progress: Progress
    best: Best | None
    guard: Guard


def open_saver(
    folder: Path, train: TrainConfig, topology: Topology, published: Callable[[], Any] = lambda: None
) -> Saver:
    """What writes a run's checkpoints into a folder and drops old ones. Collective.

    Args:
        published: called by rank 0's thread after each checkpoint.
    """

    told: set[str] = set()

    def finish() -> None:
        published()
        for problem in _tidy(folder, train.keep_last, train.keep_every):
            if problem not in told:
                logger.info(problem)
            told.add(problem)

    return Saver(folder, rank=topology.rank, size=topology.size, background=train.async_checkpoint, published=finish)


def save(saver: Saver, state: RunState, *, losses: str) -> None:
    """Begin the checkpoint of the step that `state.progress` has come to. Collective.

    Args:
        losses: the lines of all steps up to it; rank 0's are kept.
    """
    engine, loader = state.engine, state.loader
    loader.sync()
    topology = engine.topology
    tensors, plain = random_state()
    rng = whole_pieces({f"rank{topology.rank}.{name}": tensor for name, tensor in tensors.items()})
    saver.save(
        state.progress.steps,
        {**state_pieces(engine, state.ema.average), "rng": rng},
        own_state={"random": plain},
        state={
            "samples": state.progress.samples,
            "tokens": state.progress.tokens,
            "best": None if state.best is None else asdict(state.best),
            "guard": state.guard.state_dict(),
            "layout": {**asdict(topology.degrees), "step_size": state.step_size},
            "optimizer": {"updates": engine.master_shards.updates},
            "ema": state.ema.state_dict(),
            "loader": loader.state_dict(),  # the same on all ranks
            "encoders": state.feed.identity,
            "robot": state.feed.robot,
            "kernels": state.kernels,
        },
        files={
            "config.yaml": state.settings,
            LOSSES: losses,
            "dataset_stats.json": json.dumps(state.feed.statistics, indent=1),
            **({ROBOTS_FILE: to_json(state.feed.robots)} if len(state.feed.robots) > 1 else {}),
        },
    )


def step_size(data: DataConfig, train: TrainConfig, topology: Topology) -> int:
    """What a step takes from the data on all ranks: samples, or micro-batches where those have a token budget."""
    fixed = train.micro_batch if data.tokens_per_micro_batch is None else 1
    return fixed * train.accumulation * topology.degrees.data


def check_step_size(data: DataConfig, train: TrainConfig, topology: Topology, reader: CheckpointReader) -> None:
    """Refuse to continue from a checkpoint whose steps took another number of samples than those of this run.

    Raises:
        UserError: they did, or the checkpoint does not say.
    """
    old = reader.state.get("layout")
    if old is None:
        raise UserError(
            f"checkpoint {reader.path}: an older version wrote it, and it does not say how; start a stage from it by "
            "stage.init_from"
        )
    size, fixed = step_size(data, train, topology), data.tokens_per_micro_batch is None
    if size != old["step_size"]:
        factors = f"train.micro_batch={train.micro_batch} × " if fixed else ""
        raise UserError(
            f"{factors}train.accumulation={train.accumulation} × {topology.degrees.data} data ranks = {size} "
            f"{'samples' if fixed else 'micro-batches'} per step, but the run in run_dir={reader.path.parents[1]} has "
            f"{old['step_size']}; change one of them so that it stays"
        )


def changed_layout(topology: Topology, reader: CheckpointReader) -> list[str]:
    """The processes' arrangement where it is another than the checkpoint's, "key old -> new"."""
    old, new = reader.state["layout"], asdict(topology.degrees)
    return [f"{axis} ranks {old[axis]} -> {degree}" for axis, degree in new.items() if degree != old[axis]]


def resume(state: RunState, reader: CheckpointReader) -> None:
    """Continue where `reader`'s checkpoint stood, with the data that came next then. Collective.

    Raises:
        UserError: as `restore`, or other shards.
    """
    state.loader.load_state_dict(reader.state["loader"])
    restore(state, reader)


def restore(state: RunState, reader: CheckpointReader) -> None:
    """Go back to `reader`'s checkpoint, whatever layout wrote it; the loader stays where it is. Collective.

    Raises:
        UserError: other encoders, another model.
    """
    identities_match(reader.state["encoders"], state.feed.identity)
    topology = state.engine.topology
    assert reader.state["layout"]["step_size"] == state.step_size  # see check_step_size
    load_full_state(state.engine, reader)
    state.ema.load(reader)
    state.progress, state.best = progress_of(reader), best_of(reader)
    state.guard.load_state_dict(reader.state.get("guard"))
    if changed_layout(topology, reader):
        # Every rank had generators of its own, and ranks there are now others. Training draws nothing from them (noise
        # is a function of seed, step and sample), so any states will do that are the same whenever this is repeated.
        derive_random_state(state.seed, reader.step, topology.rank)
    else:
        _restore_random_state(reader, topology.rank)


def losses_of(reader: CheckpointReader | None) -> str | None:
    """The lines of all steps up to a checkpoint; None where an earlier version wrote it, "" without one."""
    if reader is None:
        return ""
    return reader.text(LOSSES) if LOSSES in reader.manifest["files"] else None


def best_of(reader: CheckpointReader) -> Best | None:
    """The best step up to a checkpoint."""
    saved = reader.state.get("best")
    return None if saved is None else Best(**saved)


def _tidy(folder: Path, keep_last: int, keep_every: int) -> list[str]:
    """Remove old checkpoints, but not the best one. What cannot be read or removed stays, and is what is returned.

    No trouble with old checkpoints ends a run.
    """
    try:
        newest, _ = find_latest(folder)
        best = None if newest is None else best_of(CheckpointReader(newest))
        _, left = prune(folder, keep_last, keep_every, keep=() if best is None else (best.step,))
    except (UserError, MachineFault) as error:
        return [f"old checkpoints are kept: {error}"]
    return left


def progress_of(reader: CheckpointReader) -> Progress:
    """What the run that wrote a checkpoint had done."""
    return Progress(reader.step, int(reader.state["samples"]), int(reader.state.get("tokens", 0)))


def _restore_random_state(reader: CheckpointReader, rank: int) -> None:
    prefix = f"rank{rank}."
    names = [name for name in reader.names("rng") if name.startswith(prefix)]
    tensors: dict[str, torch.Tensor] = {name.removeprefix(prefix): reader.read("rng", name) for name in names}
    set_random_state(tensors, reader.state["ranks"][rank]["random"])


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
