"""Training: one loop, its settings, negatives and checkpoints."""

from vouch.training.run import FitReport, Run, TrainConfig

__all__ = ["FitReport", "Run", "TrainConfig"]
