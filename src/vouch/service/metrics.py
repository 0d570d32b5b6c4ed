"""Numbers for Prometheus. With several workers their numbers are summed through `PROMETHEUS_MULTIPROC_DIR`."""

from __future__ import annotations

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The numbers of one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("vouch_requests", "Requests answered.", ["route", "status"], registry=own)
        self.seconds = Histogram("vouch_request_seconds", "Time to answer.", ["route"], buckets=SECONDS, registry=own)
        self.batches = Histogram("vouch_batch_size", "Requests a model pass.", buckets=SIZES, registry=own)
        self.events = Counter("vouch_events", "Events stored.", registry=own)
        self.duplicates = Counter("vouch_event_duplicates", "Events that were stored already.", registry=own)
        self.fallbacks = Counter("vouch_fallbacks", "Recommendations answered by popularity.", registry=own)
        self.refused = Counter("vouch_refused", "Requests refused.", ["reason"], registry=own)
        self.swaps = Counter("vouch_model_swaps", "Model swaps.", ["outcome"], registry=own)
        self.waiting = Gauge("vouch_waiting", "Requests waiting.", registry=own, multiprocess_mode="livesum")
        self.database = Gauge(
            "vouch_database_up", "Whether the database answers.", registry=own, multiprocess_mode="livemin"
        )

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            summed = CollectorRegistry()
            MultiProcessCollector(summed)
            return generate_latest(summed)
        return generate_latest(self.registry)
