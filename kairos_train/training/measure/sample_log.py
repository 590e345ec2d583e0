"""`samples/rank-….jsonl`: which samples every step was trained on, one line per step and data rank.

On request (`monitor.log_samples`): for audits of what a model has seen, and for the proof that no sample is lost or
repeated over restarts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kairos_train.basics.errors import MachineFault
from kairos_train.objective.flow_matching import ConditionedBatch
from kairos_train.operations.samples import SAMPLES
from kairos_train.training.measure.telemetry import drop_later_lines
from parallel.topology import Topology


class SampleLog:
    """Writes the log of this data rank; its first tensor and context rank writes.

    Args:
        run_dir: of the run.
        first_step: steps already done; later lines of an earlier life are dropped.
        enabled: by the configuration.
    """

    def __init__(self, run_dir: Path, *, topology: Topology, first_step: int, enabled: bool) -> None:
        self._file = None
        if not enabled or topology.tensor_rank or topology.context_rank:
            return
        path = Path(run_dir) / SAMPLES / f"rank-{topology.data_rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_later_lines(path, first_step)
        self._file = path.open("a", encoding="utf-8")

    def step(self, step: int, batches: Sequence[ConditionedBatch]) -> None:
        """Note the samples of a finished step.

        Raises:
            MachineFault: the disk takes no more.
        """
        if self._file is None:
            return
        try:
            self._file.write(json.dumps({"step": step, "samples": [b.keys for b in batches]}) + "\n")
            self._file.flush()
        except OSError as error:
            raise MachineFault(
                f"{self._file.name}: {error.strerror}; free some space and start the run again"
            ) from None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
