"""Evaluation: full rankings with fair ties, metrics, significance, cost."""

from vouch.evaluation.cost import Cost, Latency, latency, measure
from vouch.evaluation.evaluate import Evaluation, evaluate
from vouch.evaluation.metrics import DEFAULT_METRICS, parse_metric
from vouch.evaluation.significance import (
    Interval,
    Paired,
    bootstrap_interval,
    holm,
    paired_test,
    seed_interval,
    two_way_interval,
)

__all__ = [
    "DEFAULT_METRICS",
    "Cost",
    "Evaluation",
    "Interval",
    "Latency",
    "Paired",
    "bootstrap_interval",
    "evaluate",
    "holm",
    "latency",
    "measure",
    "paired_test",
    "parse_metric",
    "seed_interval",
    "two_way_interval",
]
