"""What a run reports: losses.jsonl, metrics.jsonl, samples, TensorBoard, one line of progress. Rank 0 writes.

`losses.jsonl` has one line per step and nothing that depends on time or machine, so that two runs can be compared with
a text tool. `metrics.jsonl` and TensorBoard have what was averaged since the last report: losses by σ bin, speed,
memory, model FLOPs and MFU; and what was measured in the step before it (`kairos_train.training.measure.monitor`). A
line of `metrics.jsonl` is {"step", "time" (seconds since 1970), name: value, …}."""

from __future__ import annotations

import errno
import io
import json
import math
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kairos_train.basics.errors import MachineFault
from kairos_train.basics.files import write_whole
from kairos_train.basics.json_lines import has_step, read_json_lines
from kairos_train.basics.log import logger
from kairos_train.operations.samples import SAMPLES, drop_later_samples, write_samples
from kairos_train.training.samples import Samples, images_of
from kairos_train.training.step import SIGMA_BINS, StepReport

LOSSES, METRICS, BOARD = "losses.jsonl", "metrics.jsonl", "tensorboard"


@dataclass(frozen=True)
class StagePosition:
    """Where in a curriculum a stage stands.

    Attributes:
        number: from 1 on.
        names: of all stages.
    """

    number: int
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.number} of {len(self.names)}: {self.names[self.number - 1]}"


class Telemetry:
    """The run's reports. On ranks other than 0 everything is a no-op.

    Args:
        run_dir: of the run; files continue at `first_step`, later lines of an earlier life are dropped.
        first_step: steps already done.
        losses: what losses.jsonl had then, which a checkpoint keeps, whatever became of the file since; None where an
            earlier version wrote the checkpoint: as the file has them.
        length: of the whole stage, in words.
        place: of the stage in a curriculum.
        peak_flops: of one device per second, None when unknown: no MFU then.
        world: number of processes.
        enabled: whether this process reports.

    Every method that writes raises MachineFault when the disk does not take it.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        first_step: int,
        losses: str | None = "",
        length: str,
        peak_flops: float | None,
        world: int,
        enabled: bool,
        place: StagePosition | None = None,
    ) -> None:
        self.enabled, self.length, self.place = enabled, length, place
        self.peak_flops, self.world = peak_flops, world
        self._first_report: tuple[float, float] | None = None  # time and share
        self._run_dir, self._failed = run_dir, False
        self._written = bytearray()  # all of losses.jsonl
        self._reset()
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        with self._writing(LOSSES):
            self._rebuild_losses(run_dir / LOSSES, first_step, losses)
        with self._writing(METRICS):
            drop_later_lines(run_dir / METRICS, first_step)
        with self._writing(SAMPLES):
            drop_later_samples(run_dir, first_step)
        with self._writing(LOSSES):
            self._losses = (run_dir / LOSSES).open("a", encoding="utf-8")
        with self._writing(METRICS):
            self._metrics = (run_dir / METRICS).open("a", encoding="utf-8")
        with self._writing(BOARD):
            self._board = SummaryWriter(str(run_dir / BOARD), purge_step=first_step + 1 if first_step else None)
            if place is not None:
                marked = [f"**{name}**" if i == place.number else name for i, name in enumerate(place.names, 1)]
                self._board.add_text("curriculum/stages", " → ".join(marked), first_step)

    def _rebuild_losses(self, path: Path, first_step: int, losses: str | None) -> None:
        if losses is None:
            drop_later_lines(path, first_step)
            self._written += path.read_bytes() if path.is_file() else b""
        elif losses or path.is_file():
            write_whole(path, losses)
            self._written += losses.encode()

    @property
    def losses(self) -> str:
        """All lines of losses.jsonl, for a checkpoint; "" where this process does not report."""
        return self._written.decode()

    def step(self, step: int, report: StepReport, *, lr: float, data_wait: float) -> None:
        """Record a finished step.

        Args:
            data_wait: seconds that this rank waited for batches.
        """
        if not self.enabled:
            return
        line = {"step": step, "loss": report.loss, "video_loss": report.video_loss}
        if report.action_loss is not None:
            line["action_loss"] = report.action_loss
        line |= {"grad_norm": report.grad_norm, "lr": lr, "samples": report.samples, "stepped": report.stepped}
        text = json.dumps(line) + "\n"
        self._written += text.encode()
        with self._writing(LOSSES):
            self._losses.write(text)
            self._losses.flush()
        self._last = line
        self._count += 1
        if report.stepped:  # a dropped step's losses would hide those of the others
            self._losses_of += 1
            self._sums["loss"] += report.loss
            self._sums["video_loss"] += report.video_loss
            self._sums["action_loss"] += report.action_loss or 0.0
            for stream, bins in report.bins.items():
                self._bins[stream] = self._bins.get(stream, 0) + bins
        self._sums["samples"] += report.samples
        self._sums["tokens"] += report.tokens
        self._sums["flops"] += report.flops
        self._sums["data_wait"] += data_wait
        self._skipped += not report.stepped

    def report(
        self,
        step: int,
        *,
        share: float,
        corrupt: int,
        epochs: Sequence[float],
        totals: dict[str, int],
        measured: Mapping[str, float] | None = None,
    ) -> dict[str, float]:
        """Write the averages since the last report, and one line of progress; returns what was written.

        Args:
            share: of the stage that is done.
            corrupt: samples and shards skipped.
            epochs: how often each source has been gone through.
            totals: steps, samples and tokens of the stage so far.
            measured: further values, by name.
        """
        if not self.enabled or not self._count:
            return {}
        seconds = time.perf_counter() - self._since
        values = {
            "loss/total": self._mean("loss"),
            "loss/video": self._mean("video_loss"),
            "optimizer/grad_norm": self._last["grad_norm"],
            "optimizer/lr": self._last["lr"],
            "optimizer/skipped_steps": self._skipped,
            "speed/seconds_per_step": seconds / self._count,
            "speed/samples_per_second": self._sums["samples"] / seconds,
            "speed/tokens_per_second": self._sums["tokens"] / seconds,
            "speed/model_tflops_per_second": self._sums["flops"] / seconds / 1e12,
            "speed/data_wait_share": self._sums["data_wait"] / seconds,
            "memory/gb": memory_gb(),
            "data/corrupt": corrupt,
            "progress/stage_share": share,
            "progress/samples": totals["samples"],
            "progress/tokens": totals["tokens"],
        }
        values |= {f"data/epochs_of_source_{number}": done for number, done in enumerate(epochs)}
        if self.place is not None:
            values["progress/stage_number"] = self.place.number
        if "action_loss" in self._last:
            values["loss/action"] = self._mean("action_loss")
        if self.peak_flops:
            values["speed/mfu"] = self._sums["flops"] / seconds / (self.world * self.peak_flops)
        for stream, bins in self._bins.items():
            for i, (total, count) in enumerate(bins.tolist()):
                if count:
                    values[f"loss_by_sigma/{stream}_{i / SIGMA_BINS:.1f}-{(i + 1) / SIGMA_BINS:.1f}"] = total / count
        if (headroom := headroom_gb()) is not None:
            values["memory/headroom_gb"] = headroom
        values |= measured or {}
        self.scalars(step, values)
        left = self._seconds_left(share)
        action = f" action {values['loss/action']:.4f}" if "loss/action" in values else ""
        logger.info(
            f"step {step}  {share:.0%} of {self.length}"
            f"  loss {values['loss/total']:.4f}  video {values['loss/video']:.4f}{action}"
            f"  |g| {self._last['grad_norm']:.3f}  lr {self._last['lr']:.2e}"
            f"  {values['speed/seconds_per_step']:.2f} s/step  {values['speed/samples_per_second']:.1f} samples/s"
            + ("" if left is None else f"  {left / 60:.0f} min left")
        )
        self._reset()
        return values

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write named values to TensorBoard and metrics.jsonl."""
        if not self.enabled:
            return
        with self._writing(BOARD):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        with self._writing(METRICS):
            self._metrics.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
            self._metrics.flush()

    def samples(self, step: int, samples: Samples) -> None:
        """Write sampled windows as images, and show them in TensorBoard."""
        if not self.enabled:
            return
        images = images_of(samples)
        with self._writing(SAMPLES):
            write_samples(self._run_dir, step, images)
        with self._writing(BOARD):
            for name, content in images.items():
                self._board.file_writer.add_summary(_summary(f"samples/{Path(name).stem}", content), step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take what is done within (saving, validating) out of the speed of training."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - max(begin, self._since)  # a report within begins to count at its end

    def close(self) -> None:
        """Flush and close all files. After a failed write the others are closed, and nothing is raised once more."""
        if not self.enabled:
            return
        told, faults = self._failed, []
        for name, file in ((LOSSES, self._losses), (METRICS, self._metrics), (BOARD, self._board)):
            try:
                with self._writing(name):
                    file.close()
            except MachineFault as fault:
                faults.append(fault)
        if faults and not told:
            raise faults[0]

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn what the operating system says about a file of the run into a fault of the machine."""
        try:
            yield
        except OSError as error:
            self._failed = True
            raise write_fault(self._run_dir / name, error) from error

    def _seconds_left(self, share: float) -> float | None:
        """At the pace of this life of the run; None at its first report."""
        now, first = time.perf_counter(), self._first_report
        if first is None:
            self._first_report = now, share
            return None
        return (now - first[0]) * (1 - share) / (share - first[1]) if share > first[1] else None

    def _mean(self, name: str) -> float:
        """Over the steps whose update counts; NaN when there is none."""
        return self._sums[name] / self._losses_of if self._losses_of else math.nan

    def _reset(self) -> None:
        self._since, self._count, self._losses_of, self._skipped = time.perf_counter(), 0, 0, 0
        self._last: dict[str, Any] = {}
        names = ("loss", "video_loss", "action_loss", "samples", "tokens", "flops", "data_wait")
        self._sums = dict.fromkeys(names, 0.0)
        self._bins: dict[str, torch.Tensor] = {}


def write_fault(path: Path, error: OSError) -> MachineFault:
    """What to raise for a file of a run that could not be written: one line with the remedy."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    remedy = "free some" if full else "see to the disk"
    return MachineFault(f"{path}: {error.strerror or error}; {remedy} and start the run again")


def drop_later_lines(path: Path, last_step: int) -> None:
    """Keep the lines of a JSON-lines file up to `last_step`: what a killed life wrote past its checkpoint is redone.

    Lines that cannot be read go too, and are reported. The file is replaced whole.
    """
    if path.is_file():
        lines = read_json_lines(path, has_step)
        write_whole(path, b"".join(line.text for line in lines if line.value["step"] <= last_step))


def _summary(tag: str, content: bytes) -> Any:
    """An image file as TensorBoard shows it; its own method takes no moving ones."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(io.BytesIO(content)) as opened:
        image = Summary.Image(height=opened.height, width=opened.width, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def memory_gb() -> float:
    """Peak memory of this process in GB: of the GPU on CUDA, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def headroom_gb() -> float | None:
    """Memory that is still free at the peak, in GB: of the GPU, else what the machine can give; None where unknown."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        _, total = torch.cuda.mem_get_info()
        return (total - torch.cuda.max_memory_reserved()) / 1e9
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(available[0]) * 1024 / 1e9 if available else None
