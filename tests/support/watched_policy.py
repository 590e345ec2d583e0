"""For tests of simulators' clients: an export to serve, and a client that keeps what it sends."""

from pathlib import Path
from typing import Any

from support.serving_exports import config_of, write_export

from kairos_train.serving.client import PolicyClient
from kairos_train.serving.policy import ServedPolicy


class Watched(PolicyClient):
    """Keeps its requests in `sent`."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.sent: list[dict[str, Any]] = []

    def infer(self, observation):
        self.sent.append(dict(observation))
        return super().infer(observation)


def served(folder: Path, **settings: Any) -> ServedPolicy:
    """A small random policy of these sizes and cameras."""
    return ServedPolicy(write_export(folder, config_of(**settings)), steps=1)
