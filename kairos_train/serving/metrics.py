"""What a server counts, for Prometheus. One registry per server: two servers in one process do not mix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
ERRORS = ("message", "observation", "size", "token", "connections", "handshake", "internal")
"""Kinds of errors: unreadable message; unfit observation; message over the cap; wrong or no token; one connection too
many; a socket closed in its handshake to make room; a fault of the server."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters and histograms of one server, used from its event loop; `clipped` from the batcher's thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        with_registry = {"registry": self._registry}
        self.requests = Counter("kairos_policy_requests", "Observations answered with actions", **with_registry)
        self.errors = Counter("kairos_policy_errors", "Errors by kind", ["kind"], **with_registry)
        self.resets = Counter("kairos_policy_resets", "Histories cleared by clients", **with_registry)
        self.clipped = Counter(
            "kairos_policy_clipped_action_values", "Values of actions bounded to the data's range", **with_registry
        )
        self.connections = Gauge("kairos_policy_connections", "Open connections", **with_registry)
        self.waiting = Gauge("kairos_policy_waiting", "Requests accepted and not answered yet", **with_registry)
        self.latency = Histogram(
            "kairos_policy_latency_seconds", "From request to reply", buckets=_SECONDS, **with_registry
        )
        self.inference = Histogram(
            "kairos_policy_inference_seconds", "One batch in the model", buckets=_SECONDS, **with_registry
        )
        self.batch_size = Histogram(
            "kairos_policy_batch_size", "Requests computed together", buckets=_SIZES, **with_registry
        )
        for kind in ERRORS:  # there from the start, at 0
            self.errors.labels(kind)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)
