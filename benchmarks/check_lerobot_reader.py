"""Opens a dataset of ours with the official lerobot package and compares what the two readers see.

Run by hand: `python benchmarks/check_lerobot_reader.py DATASET`. lerobot pins its own torch, so it goes into a virtual
environment of its own (some gigabytes, kept with `--venv FOLDER`). Compared are actions, states, timestamps and tasks
(exactly) and pictures (within half a level in the mean: neighbours differ by more), for a few rows of every episode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from dataloaders.lerobot.reader import LeRobotDataset
from kairos_train.basics.errors import UserError

LEROBOT = "lerobot==0.4.4"
LEVELS = 0.5  # largest difference of mean level allowed between the two decodings of a picture
ROWS_PER_EPISODE = 4

# Runs where lerobot is: DATASET CAMERAS ROWS RESULT. pyav is named because torchcodec wants a system-wide FFmpeg.
OFFICIAL = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

root, cameras, rows, result = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
dataset = LeRobotDataset("local/check", root=root, video_backend="pyav")
items = [dataset[row] for row in rows]
arrays = {key: np.stack([item[key].numpy() for item in items]) for key in ("action", "observation.state", "timestamp")}
arrays |= {key: np.stack([(item[key].numpy().transpose(1, 2, 0) * 255).round() for item in items]) for key in cameras}
arrays["task"] = np.array([item["task"] for item in items])
arrays["total"] = np.array([dataset.num_episodes, dataset.num_frames])
np.savez(result, **arrays)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--venv", type=Path, help="folder of the environment with lerobot; made when absent and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = environment(arguments.venv or Path(folder) / "venv")
            print(compare(arguments.dataset.resolve(), python, Path(folder) / "official.npz"))
        except UserError as error:
            print(f"check_lerobot_reader: {error}", file=sys.stderr)
            return 1
    return 0


def environment(folder: Path) -> Path:
    """The interpreter of an environment with lerobot, installed when the folder has none.

    Raises:
        UserError: it cannot be installed.
    """
    python = folder / "bin" / "python"
    if python.is_file():
        return python
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", LEROBOT],
    ):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise UserError(
                f"{LEROBOT} cannot be installed ({last_line(run.stderr)}); check the package index and the disk"
            )
    return python


def compare(root: Path, python: Path, result: Path) -> str:
    """One line saying what agreed.

    Raises:
        UserError: lerobot cannot read the dataset, or reads something else than our reader.
    """
    ours = LeRobotDataset(root)
    first, rows, expected = 0, [], {"action": [], "observation.state": [], "timestamp": [], "task": []}
    expected |= {key: [] for key in ours.camera_keys}
    for episode in ours:
        picked = np.unique(np.linspace(0, episode.length - 1, ROWS_PER_EPISODE).astype(int))
        rows += [int(first + row) for row in picked]
        first += episode.length
        for key in ("action", "observation.state"):
            expected[key] += list(episode.columns[key][picked])
        expected["timestamp"] += list(episode.timestamps[picked])
        expected["task"] += [episode.tasks[0]] * len(picked)
        for key in ours.camera_keys:
            expected[key] += list(episode.frames(key, picked))
    command = [str(python), "-c", OFFICIAL, str(root), json.dumps(ours.camera_keys), json.dumps(rows), str(result)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise UserError(f"lerobot cannot read {root}: {last_line(run.stderr)}")
    worst = 0.0
    with np.load(result) as official:
        if official["total"].tolist() != [ours.num_episodes, first]:
            raise UserError(
                f"lerobot sees {official['total'].tolist()} episodes and frames, we {[ours.num_episodes, first]}"
            )
        for key, values in expected.items():
            mine = np.array(values)
            if key in ours.camera_keys:
                difference = np.abs(mine.astype(np.float32) - official[key]).mean(axis=(1, 2, 3)).max()
                worst = max(worst, float(difference))
            elif not np.array_equal(mine.astype(official[key].dtype), official[key]):
                raise UserError(f"lerobot reads other values of {key!r} than our reader from {root}")
    if worst > LEVELS:
        raise UserError(f"lerobot shows other pictures: mean difference {worst:.2f} levels, {LEVELS} allowed")
    return (
        f"lerobot agrees: {ours.num_episodes} episodes, {len(rows)} rows compared, pictures within {worst:.2f} levels"
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


if __name__ == "__main__":
    sys.exit(main())
