"""What `import kairos_train as kt` offers: a function for each step from a dataset to a policy that acts.

Each does what the command of the same name does. What a function needs is imported inside it: `load` runs where the
project is installed without extras (torch, numpy, safetensors, pillow), the others need the extra `train`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos_train.basics.errors import UserError as UserError
from kairos_train.basics.extras import extras_are_named

if TYPE_CHECKING:
    import numpy as np

    from kairos_train.config.schema import Config
    from kairos_train.serving.policy import ServedPolicy

TASK = "task"
"""What datasets call the instruction; the policy server's protocol calls it `prompt`."""


class Policy:
    """A policy in this process: the answers of `kairos-train serve` without a server. Made by `load`.

    Attributes:
        metadata: what a client of the server is told on connecting: `horizon`, `action_dim`, `state_dim`, `fps`,
            `cameras`, `given_frames`, …
    """

    def __init__(self, served: ServedPolicy) -> None:
        self._served, self._history = served, served.history()
        self.metadata: dict[str, Any] = served.metadata

    def __repr__(self) -> str:
        about = self.metadata
        sizes = ", ".join(f"{name}={about[name]}" for name in ("state_dim", "action_dim", "horizon"))
        return f"Policy(observation_keys={list(self.observation_keys)}, {sizes})"

    @property
    def observation_keys(self) -> tuple[str, ...]:
        """The keys of an observation, as the dataset has them: cameras, state, instruction."""
        return (*self._served.reader.layouts[0].keys, TASK)

    def act(self, observation: Mapping[str, Any], *, seed: int | None = None) -> np.ndarray:
        """The next actions.

        Args:
            observation: by the keys of the dataset (`observation_keys`), or of the robots whose keys the server knows
                (`metadata["observation_keys"]`). Pictures uint8 (H, W, 3) of any size, which are scaled and cropped as
                for training; the state (state_dim,) in the dataset's units; the instruction under `task` or `prompt`.
                A model that is given T frames may get n ≤ T of them at once, oldest first: pictures (n, H, W, 3),
                states (n, state_dim); else it remembers those of earlier calls.
            seed: of the noise; None draws one. The same observations and seed give the same actions.

        Returns:
            float32 (horizon, action_dim), in the dataset's units; the first one is for now.

        Raises:
            UserError: names the key that is missing, unknown or unfit.
        """
        message = {key: _array(value) for key, value in observation.items()}
        if TASK in message:
            if "prompt" in message:
                raise UserError("observation: has 'task' and 'prompt', which are the same thing; give one of them")
            if not isinstance(message[TASK], str):
                raise UserError(f"'task': is a {type(message[TASK]).__name__}; give the instruction as text")
            message["prompt"] = message.pop(TASK)
        if seed is not None:
            message["seed"] = seed
        window = self._history.window(self._served.reader.read(message))
        return self._served.act([window])[0]

    def reset(self) -> None:
        """Forget the frames of earlier calls; before each episode."""
        self._history.clear()


def _array(value: Any) -> Any:
    """Lists and whatever else numpy reads as arrays."""
    import numpy as np

    return np.asarray(value) if isinstance(value, list | tuple) or hasattr(value, "__array__") else value


@extras_are_named()
def load(
    export: Path | str,
    *,
    robot: str | None = None,
    cameras: Sequence[str] = (),
    steps: int | None = None,
    device: str = "auto",
) -> Policy:
    """Load a policy.

    Args:
        export: folder that `export` or `kairos-train export` wrote.
        robot: name of one of several that it was trained on; None: the first.
        cameras: the dataset's camera keys in the order of training, for an export that does not say.
        steps: of the sampler; None: as the export says.
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        UserError: not an export, or one without actions, robot or device as asked for.
    """
    from kairos_train.basics.device import device_of
    from kairos_train.serving.policy import ServedPolicy

    where = device_of(device)
    return Policy(ServedPolicy(Path(export), steps=steps, cameras=cameras, robot=robot, device=where))


@extras_are_named()
def compose(overrides: Sequence[str] = (), *, config_dirs: Sequence[Path | str] = ()) -> Config:
    """The settings of a run, resolved; what has to be given and is not yet is "???".

    Args:
        overrides: `GROUP=OPTION` and `KEY=VALUE`, as on the command line.
        config_dirs: folders of your own configurations, laid out as `configs/`.

    Raises:
        UserError: names the key or option that is wrong, and the nearest one.
    """
    from kairos_train.config.compose import load_config

    return load_config(_texts(overrides), config_dirs=config_dirs, sections=())


@extras_are_named()
def pack(
    source: Path | str,
    out: Path | str,
    overrides: Sequence[str] = (),
    *,
    encode: bool = False,
    only_episodes: str | None = None,
    captions: Path | str | None = None,
    on_bad: str = "stop",
    shard_samples: int = 256,
    processes: int = 1,
    config_dirs: Sequence[Path | str] = (),
) -> dict[str, Any]:
    """Cut a dataset into training samples; called again, it goes on where it was stopped.

    Args:
        source: a LeRobot dataset, a manifest of videos or images, or WebDataset tars.
        out: folder of the shards.
        overrides: settings of the run that is to train on them: windows, cameras, encoders.
        encode: store latents and contexts of the configured encoders too.
        only_episodes: LeRobot: as "0-89" or "0-9,12"; None: the dataset's own split `train`, where it has one.
        captions: LeRobot: JSON lines with captions of episodes.
        on_bad: what cannot be used: "stop", or "skip" and list it.
        shard_samples: most samples of a shard.
        processes: at the same time; each with encoders of its own.
        config_dirs: as for `compose`.

    Returns:
        The content of the shards' index.json.

    Raises:
        UserError: a setting, key, camera or episode that cannot be used, named; `out` holds something else.
    """
    import functools

    from dataloaders.config import READING
    from dataloaders.lerobot.splits import parse_episodes
    from dataloaders.packing.pack import pack as pack_source
    from kairos_train.basics.device import device_of
    from kairos_train.config.compose import load_config

    config = load_config(_texts(overrides), config_dirs=config_dirs, sections=(*READING, "encoders"))
    data, encoder = config.data, None
    if encode:
        from kairos_train.conditioning.sample_encoder import load_sample_encoder

        encoder = functools.partial(load_sample_encoder, config.encoders, device_of(config.train.device))
    return pack_source(
        source,
        out,
        window=data.window,
        clips=data.clips,
        prompt_template=data.prompt_template,
        captions=None if captions is None else Path(captions),
        only_episodes=None if only_episodes is None else parse_episodes(only_episodes),
        believe=data.believe,
        timestamp_tolerance=data.timestamp_tolerance,
        limits=data.limits,
        encoder=encoder,
        processes=processes,
        shard_samples=shard_samples,
        on_bad=on_bad,
    )


@extras_are_named()
def train(overrides: Sequence[str] = (), *, config_dirs: Sequence[Path | str] = ()) -> Path:
    """Train a stage, or the stages of a curriculum, in this process; called again, it goes on from where it was.

    Under `torchrun` every process calls it. Data that the experiment lists (`prepare`) is made where it is missing.

    Args:
        overrides, config_dirs: as for `compose`.

    Returns:
        The last checkpoint.

    Raises:
        UserError: something in the settings, the shards or the checkpoint does not fit the rest.
        kairos_train.basics.errors.RunStopped: more bad steps than `guard` allows.
        kairos_train.basics.errors.Interrupted: it was asked to stop and has written its checkpoint.
        kairos_train.basics.errors.MachineFault: a process, a disk or the data's file system failed.
    """
    from kairos_train.config.curriculum import load_curriculum
    from kairos_train.launch.prepare import prepare

    curriculum = load_curriculum(_texts(overrides), config_dirs=config_dirs)
    prepare(curriculum.prepare)  # before the heavy imports: an error shows at once
    from kairos_train.training.curriculum import train_curriculum
    from kairos_train.training.engine.deepspeed_engine import stop_processes

    last = train_curriculum(curriculum)
    stop_processes()
    return last


@extras_are_named()
def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    best: bool = False,
    weights: str = "ema",
    form: str = "standalone",
    dtype: str | None = None,
    quantize: str | None = None,
) -> Path:
    """Turn a checkpoint into a folder for inference.

    Args:
        checkpoint: a run, a checkpoint, or an import.
        out: the export; must not exist.
        best: of a run, not the last checkpoint but the best validated.
        weights: "ema", averaged, or "raw".
        form: "standalone", for `load`, or "public", for the public code.
        dtype: "bf16", "fp32" or "stored"; None: as stored for imported weights, else bf16.
        quantize: "int8", "fp8" or "int4": the large linear layers, weight-only; None: none.

    Returns:
        `out`.

    Raises:
        UserError: unknown options, `out` exists, or the checkpoint is damaged or lacks what is asked for.
    """
    from kairos_train.checkpoint.resolve import resolve_best
    from kairos_train.weights.export import export as write

    taken = resolve_best(Path(checkpoint)) if best else Path(checkpoint)
    write(taken, Path(out), form=form, weights=weights, dtype=dtype, quantize=quantize)
    return Path(out)


@extras_are_named()
def evaluate(
    export: Path | str,
    shards: Path | str,
    out: Path | str,
    *,
    parts: Sequence[str] | None = None,
    samples: int = 200,
    videos: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    robot: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Judge a model on held-out windows, beside baselines.

    Args:
        export: as for `load`.
        shards: folder of windows that the model was not trained on.
        out: folder for numbers, plots and report.html; must not hold an evaluation.
        parts: of "open_loop", "losses", "video", "memory"; None: all that the model can do.
        samples: windows of open_loop and losses.
        videos: rollouts of the video part.
        steps, guidance: of the sampler; None: as the export says.
        seed: of the noise.
        robot: of several trained on, by dataset; None: the one that the shards are of.
        device: as for `load`.

    Returns:
        The content of evaluation.json: "parts" with the numbers of each, "left_out" with the reasons.

    Raises:
        UserError: a part that this model cannot be judged by; shards that do not fit it.
    """
    from evaluation.run import Settings
    from evaluation.run import evaluate as measure
    from evaluation.video import DriftSettings
    from kairos_train.basics.device import device_of

    settings = Settings(
        parts=parts,
        samples=samples,
        steps=steps,
        guidance=guidance,
        seed=seed,
        drift=DriftSettings(videos=videos),
        robot=robot,
    )
    return measure(Path(export), shards=Path(shards), out=Path(out), settings=settings, device=device_of(device))


def _texts(overrides: Sequence[str]) -> list[str]:
    if isinstance(overrides, str):
        raise UserError(f"overrides={overrides!r}: is one text; give a list of them, as [{overrides!r}]")
    return list(overrides)
