"""Where each rank's output goes: into files named by its number in the world; rank 0's is shown, too."""

from __future__ import annotations

from pathlib import Path

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs


class RankLogs(LogsSpecs):
    """For torch's `LaunchConfig`.

    Args:
        folder: exists.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder))
        self._folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """The files of a node's ranks, from the environment that each of them is going to have."""
        stems = {local: str(self._folder / f"rank-{int(env['RANK']):04d}") for local, env in envs.items()}
        for local, stem in stems.items():
            envs[local]["TORCHELASTIC_ERROR_FILE"] = f"{stem}.error.json"
        shown = [local for local, env in envs.items() if env["RANK"] == "0"]
        return LogsDest(
            stdouts={local: f"{stem}.out" for local, stem in stems.items()},
            stderrs={local: f"{stem}.err" for local, stem in stems.items()},
            tee_stdouts={local: f"{stems[local]}.out" for local in shown},
            tee_stderrs={local: f"{stems[local]}.err" for local in shown},
            error_files={local: f"{stem}.error.json" for local, stem in stems.items()},
        )
