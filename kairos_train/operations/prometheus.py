"""A run's numbers for Prometheus: a file in the text format that node_exporter's textfile collector reads.

node_exporter accepts no times in such files, so `kairos_train_last_report_timestamp_seconds` tells how old the numbers
are.

Metrics are named as in TensorBoard, `speed/mfu` → `kairos_train_speed_mfu`; what TensorBoard has as a family is one
metric with a label, as `FAMILIES` says.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kairos_train.basics.errors import UserError

if TYPE_CHECKING:
    from prometheus_client import Metric

PREFIX = "kairos_train_"
SUFFIX = ".prom"
FAMILIES = {
    "loss_by_sigma": ("loss_by_sigma", "bin"),
    "grad_norm": ("grad_norm_by_kind", "kind"),
    "communication": ("communication_seconds", "group"),
    "decay": ("decay", "statistic"),
    "validation_raw": ("validation_loss_raw", "stream"),
    "validation_ema": ("validation_loss_ema", "stream"),
}
"""What stands before the slash → metric, and the label that has what stands behind it."""

HELP = {
    "step": "Optimiser steps done",
    "running": "1 while the run goes, 0 when it has ended",
    "last_report_timestamp_seconds": "When these numbers were measured, in seconds since 1970",
    "events_total": "Events of the run over all its lives, as in events.jsonl",
    "optimizer_skipped_steps": "Steps since the last report whose update was dropped",
    "progress_stage_share": "Share of the stage's budget that is done",
    "speed_data_wait_share": "Share of the time that was waited for data",
    "communication_seconds": "Seconds that one step spends in collectives of a group",
}
"""Metric → what it is; the others say where they are explained."""


class TextFile:
    """The file of one run. Every update replaces it whole.

    Args:
        path: ends in .prom, in the folder that node_exporter is given.
        labels: of every metric, such as run and stage.
        counts: events of earlier lives, by kind.
        say: told when the file cannot be written, once until it can be again: a run does not end for that.
        clock: seconds since 1970.

    Raises:
        UserError: another ending, which node_exporter would pass over without a word, or no such folder.
    """

    def __init__(
        self,
        path: Path,
        *,
        labels: Mapping[str, str],
        counts: Mapping[str, int] | None = None,
        say: Callable[[str], Any],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path, self.labels = Path(path), dict(labels)
        if self.path.suffix != SUFFIX:
            raise UserError(f"monitor.prometheus_file={path}: node_exporter reads *{SUFFIX} alone; name it so")
        if not self.path.parent.is_dir():
            raise UserError(f"monitor.prometheus_file={path}: {self.path.parent} is no folder; make it")
        self._values: dict[str, float] = {}
        self._counts = Counter(counts or {})
        self._say, self._clock, self._failed = say, clock, False

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Take in numbers of a report or a validation; those that are not named stay.

        Args:
            step: that they belong to.
            values: by name, as in TensorBoard.
        """
        self._values |= {**values, "step": step, "running": 1, "last_report_timestamp_seconds": self._clock()}
        self._write()

    def count(self, kind: str) -> None:
        """Count an event; written with the next update."""
        self._counts[kind] += 1

    def close(self) -> None:
        """Say that the run has ended. The file stays, with the last numbers."""
        self._values["running"] = 0
        self._write()

    def collect(self) -> Iterator[Metric]:
        """The metrics, as the prometheus_client package asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        gauges: dict[str, GaugeMetricFamily] = {}
        for name, value in self._values.items():
            metric, own = _named(name)
            if metric not in gauges:
                about = HELP.get(metric, "See docs/monitoring.md")
                gauges[metric] = GaugeMetricFamily(PREFIX + metric, about, labels=[*self.labels, *own])
            gauges[metric].add_metric([*self.labels.values(), *own.values()], value)
        yield from gauges.values()
        counter = CounterMetricFamily(f"{PREFIX}events", HELP["events_total"], labels=[*self.labels, "kind"])
        for kind in sorted(self._counts):
            counter.add_metric([*self.labels.values(), kind], self._counts[kind])
        if self._counts:
            yield counter

    def _write(self) -> None:
        from prometheus_client import write_to_textfile

        try:
            write_to_textfile(str(self.path), self)
        except OSError as error:
            if not self._failed:
                self._say(f"monitor.prometheus_file={self.path} cannot be written ({error.strerror}); the run goes on")
            self._failed = True
            return
        self._failed = False


def _named(name: str) -> tuple[str, dict[str, str]]:
    """Metric and label of a name as in TensorBoard."""
    family, slash, member = name.partition("/")
    if slash and family in FAMILIES:
        metric, label = FAMILIES[family]
        return metric, {label: member}
    return re.sub(r"[^a-zA-Z0-9_]", "_", name), {}
