"""`samples/step-…/`: what a run samples while it trains, as images that anything shows; the same are in TensorBoard.

samples/step-00000500/video_0.gif      sampled frames beside the recorded ones
samples/step-00000500/actions_0.png    curves of both
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kairos_train.basics.files import write_whole

SAMPLES = "samples"
KINDS = (".gif", ".png")


@dataclass(frozen=True)
class SampledImage:
    """One image.

    Attributes:
        step: after which it was sampled.
        path: of the file.
    """

    step: int
    path: Path

    @property
    def kind(self) -> str:
        """gif or png."""
        return self.path.suffix.removeprefix(".")


def write_samples(run_dir: Path, step: int, images: Mapping[str, bytes]) -> None:
    """Write the images of a step, by file name.

    Raises:
        OSError: they cannot be written.
    """
    folder = Path(run_dir) / SAMPLES / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in images.items():
        write_whole(folder / name, content)


def newest_samples(run_dir: Path) -> list[SampledImage]:
    """The images of the last step that was sampled, in order of their names; none without any."""
    for step, folder in sorted(_steps(run_dir), reverse=True):
        if found := [path for path in sorted(folder.iterdir()) if path.suffix in KINDS]:
            return [SampledImage(step, path) for path in found]
    return []


def drop_later_samples(run_dir: Path, last_step: int) -> None:
    """Remove what was sampled after a step: a run that goes on from there samples it again.

    Raises:
        OSError: it cannot be removed.
    """
    for step, folder in _steps(run_dir):
        if step > last_step:
            shutil.rmtree(folder)


def _steps(run_dir: Path) -> list[tuple[int, Path]]:
    folders = [(path.name.removeprefix("step-"), path) for path in (Path(run_dir) / SAMPLES).glob("step-*")]
    return [(int(step), path) for step, path in folders if step.isdecimal() and path.is_dir()]
