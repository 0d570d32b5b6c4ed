"""Training: one loop, its settings, negatives and checkpoints."""

from vouch.training.devices import seeded
from vouch.training.loop import Batches, fit
from vouch.training.negatives import NegativeSampler
from vouch.training.run import FitReport, Run, TrainConfig

__all__ = ["Batches", "FitReport", "NegativeSampler", "Run", "TrainConfig", "fit", "seeded"]
