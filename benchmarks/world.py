"""How well a world model foresees: its pictures 4, 8 and 16 frames ahead beside the recording of unseen episodes.

Beside the model stand copying the last given frame and the recording through the model's own video codec, in dB over
all pixels and over those that move (`evaluation.world` has the definitions).

    python benchmarks/world.py EXPORT --shards SHARDS [--windows 64] [--mode joint] [--steps N] [--quick]

--quick takes 8 windows. The last line is one JSON object: machine, `moving_gain_db` (model over copying, the least over
horizons 8 and 16), `gap_closed` (of the squared error between copying and the codec, the least there, both on moving
pixels), `gap_to_codec_db` (at horizon 4, on moving pixels), `codec_db` (all pixels, the least of all horizons), and
`horizons` with everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from evaluation.world import HORIZONS, foresight, format_table


def summary(horizons: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The four figures of `foresight`'s "horizons"; None where nothing moves."""
    later = [horizons[h] for h in horizons if int(h) >= 8]
    near = horizons[min(horizons, key=int)]
    codec, model = near["codec"]["moving_db"], near["model"]["moving_db"]
    return {
        "moving_gain_db": _least(entry["moving_gain_db"] for entry in later),
        "gap_closed": _least(entry["gap_closed"] for entry in later),
        "gap_to_codec_db": None if codec is None else codec - model,
        "codec_db": _least(entry["codec"]["db"] for entry in horizons.values()),
    }


def _least(values: Any) -> float | None:
    return min((value for value in values if value is not None), default=None)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, help="folder written by `kairos-train export`")
    parser.add_argument("--shards", type=Path, required=True, help="windows with frames, of unseen episodes")
    parser.add_argument("--windows", type=int, default=64, help="spread evenly over the shards")
    parser.add_argument("--mode", choices=("joint", "video"), default="joint", help="of the sampler")
    parser.add_argument("--steps", type=int, default=None, help="of the sampler; none: the export's")
    parser.add_argument("--quick", action="store_true", help="8 windows, under 50 s")
    args = parser.parse_args()
    windows = 8 if args.quick else args.windows
    started = time.monotonic()
    found = foresight(
        args.export, shards=args.shards, horizons=HORIZONS, windows=windows, mode=args.mode, steps=args.steps
    )
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{machine}; torch {torch.__version__}; {windows} windows, {time.monotonic() - started:.0f} s")
    print(format_table(found))
    print(json.dumps({"machine": machine, **summary(found["horizons"]), **found}))


if __name__ == "__main__":
    main()
