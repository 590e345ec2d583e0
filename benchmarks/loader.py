"""What the data loader costs beside the plainest way to read the same bytes.

* Cached latents, in shards as `data pack --encode` writes them (clips left out: training on latents skips them):
  samples per second of `ShardLoader` (batches of 8 or 32, shuffled, checked) over those of `tarfile` that
  reads every member's bytes and does nothing with them. Two sizes: 33 frames of 480p latents (0.9 MB per sample) and
  windows of the 64-pixel demo.
* Clips: frames per second of `ShardLoader` that decodes them over those of PyAV that decodes the same clips to RGB.
* Memory: growth of the resident sets of this process and one loader process over 50,000 small samples.

Both sides of a ratio run in this process, epoch about epoch, from the page cache (torch with one thread, FFmpeg with
its own choice on both sides); medians over the rounds.

    python benchmarks/loader.py [--rounds 9] [--folder DIR] [--quick]

The last line is one JSON object: `tar_ratio` (the lower of the two sizes), `decode_ratio`, `memory_growth_mb`, details.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import torch

from dataloaders.config import DataConfig, WindowConfig
from dataloaders.files.video_encoder import encode_mp4
from dataloaders.loading.cursor import LoaderShard
from dataloaders.loading.loader import ShardLoader
from dataloaders.shards import INDEX, ShardIndex, sample_block, write_shard
from kairos_train.basics.files import write_json
from kairos_train.basics.geometry import LATENT_CHANNELS, latent_frames, latent_sides

SMALL_SAMPLES = 50_000
"""Of the memory's measurement."""


def npy(value: np.ndarray) -> bytes:
    """A .npy file."""
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


def write_shards(
    folder: Path, window: WindowConfig, shards: int, samples: int, make: Callable[[int], dict[str, bytes]]
) -> Path:
    """A shard folder of windows with 32 actions; `make` gives the members that differ."""
    actions = (window.frames - 1) * window.action_video_freq_ratio
    folder.mkdir(parents=True)
    infos, number = [], 0
    for i in range(shards):
        blocks = []
        for _ in range(samples):
            meta = {"text": f"task {number % 9}", "task": "", "episode": number, "start": 0, "valid_actions": actions}
            members = {"json": json.dumps(meta).encode(), "state.npy": npy(np.ones((1, 14), np.float32))}
            members["action.npy"] = npy(np.full((actions, 14), number, np.float32))
            blocks.append(sample_block(f"bench-{number:06d}-000000", members | make(number)))
            number += 1
        infos.append(write_shard(folder / f"shard-{i:06d}.tar", blocks))
    index = ShardIndex(
        folder=folder,
        samples=number,
        window=window,
        prompt_template="{task}",
        action_dim=14,
        state_dim=14,
        fps=16.0,
        encoders=None,
        tasks=[],
        source={},
        shards=tuple(infos),
    )
    write_json(folder / INDEX, index.to_dict())
    return folder


def latent_members(window: WindowConfig, tokens: int, width: int) -> Callable[[int], dict[str, bytes]]:
    """Random latents of the window and a context of `tokens` x `width`, as packed: float16."""
    rng = np.random.default_rng(0)
    shape = (LATENT_CHANNELS, latent_frames(window.frames), *latent_sides(window.height, window.width))
    latents, context = rng.standard_normal(shape), rng.standard_normal((tokens, width))
    members = {"latents.npy": npy(latents.astype(np.float16)), "context.npy": npy(context.astype(np.float16))}
    return lambda number: members


def clip_members(window: WindowConfig) -> Callable[[int], dict[str, bytes]]:
    """A moving texture, as packed."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 255, (window.height // 8 + window.frames, window.width // 8, 3)).astype(np.uint8)
    picture = low.repeat(8, axis=0).repeat(8, axis=1)
    frames = np.stack([picture[4 * t : 4 * t + window.height] for t in range(window.frames)])
    file = io.BytesIO()
    encode_mp4(file, frames, 16.0, codec="h264", gop=8)
    return lambda number: {"mp4": file.getvalue()}


def read_tar(folder: Path) -> int:
    """Bytes of all members of all shards."""
    total = 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            total += sum(len(tar.extractfile(member).read()) for member in tar)
    return total


def decode_clips(folder: Path) -> Callable[[], int]:
    """Decodes every clip of the folder to RGB with PyAV alone; their bytes are in memory already."""
    clips = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            clips += [tar.extractfile(member).read() for member in tar if member.name.endswith(".mp4")]

    def decode() -> int:
        total = 0
        for clip in clips:
            with av.open(io.BytesIO(clip)) as container:
                container.streams.video[0].thread_type = "AUTO"
                pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
                total += len(pictures)
        return total

    return decode


@contextmanager
def open_loader(folder: Path, batch_size: int, *, with_frames: bool, workers: int = 0) -> Iterator[ShardLoader]:
    """A loader with a shuffle over a few shards."""
    data = DataConfig(shards=str(folder), workers=workers, shuffle_buffer=64)
    loader = ShardLoader(data, LoaderShard(batch_size, 1, 0, 1), seed=0, with_frames=with_frames)
    yield loader
    loader.close()


def compare(loader: ShardLoader, plain: Callable[[], int], rounds: int) -> tuple[float, float]:
    """Samples per second of whole epochs by the loader, and that over the same with `plain` in its place."""
    samples = loader.index.samples
    ours, ratios = [], []
    for round_ in range(rounds + 1):
        begin = time.perf_counter()
        for _ in range(samples // loader.share.micro_batch):
            next(loader)
        middle = time.perf_counter()
        plain()
        if round_:  # the first fills the page cache
            ours.append(middle - begin)
            ratios.append((time.perf_counter() - middle) / ours[-1])
    return samples / statistics.median(ours), statistics.median(ratios)


def resident_mb() -> float:
    """Of this process and its loader process."""
    pages = 0
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory_growth(folder: Path) -> float:
    """MB gained from the first tenth of the samples to the last."""
    with open_loader(folder, 50, with_frames=False, workers=1) as loader:
        for i in range(SMALL_SAMPLES // 50):
            next(loader)
            if i == SMALL_SAMPLES // 500:
                before = resident_mb()
        return resident_mb() - before


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the shards are written; a temporary folder by default")
    parser.add_argument("--quick", action="store_true", help="smaller shards and fewer rounds, under 50 s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds, scale = (3, 1) if args.quick else (args.rounds, 4)

    large = WindowConfig(frames=33, action_video_freq_ratio=1, height=480, width=416)
    small = WindowConfig(frames=5, action_video_freq_ratio=2, height=64, width=64)
    result: dict[str, float | str] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    print(f"{result['machine']}; torch {torch.__version__}; one process, one thread, {rounds} rounds")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        # window, shards, samples per shard, batch, context tokens x width
        cases = {
            "latents_480p": (large, 4 * scale, 32, 8, latent_members(large, 4, 2048)),
            "latents_64px": (small, 4 * scale, 512, 32, latent_members(small, 24, 64)),
        }
        for case, (window, shards, samples, batch, make) in cases.items():
            folder = write_shards(root / case, window, shards, samples, make)
            with open_loader(folder, batch, with_frames=False) as loader:
                ours, ratio = compare(loader, lambda folder=folder: read_tar(folder), rounds)
            result[f"{case}_per_second"], result[f"{case}_ratio"] = round(ours, 1), round(ratio, 3)
            print(f"{case:14s} {ours:9.1f} samples/s, {ratio:.2f} of tarfile's")
        decoded = WindowConfig(frames=33, action_video_freq_ratio=1, height=480, width=832)
        folder = write_shards(root / "clips", decoded, 2, 4 * scale, clip_members(decoded))
        with open_loader(folder, 4, with_frames=True) as loader:
            ours, ratio = compare(loader, decode_clips(folder), rounds)
        print(f"{'clips_480p':14s} {ours:9.1f} samples/s of 33 frames, {ratio:.2f} of PyAV's")
        growth = memory_growth(root / "latents_64px")
        print(f"memory over {SMALL_SAMPLES} small samples: {growth:+.1f} MB")
    result |= {
        "clips_480p_frames_per_second": round(33 * ours, 1),
        "tar_ratio": min(result["latents_480p_ratio"], result["latents_64px_ratio"]),
        "decode_ratio": round(ratio, 3),
        "memory_growth_mb": round(growth, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
