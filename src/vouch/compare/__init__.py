"""Comparing methods honestly: equal budgets, several seeds, intervals, costs, a verdict and a report."""

from vouch.compare.compare import Comparison, compare
from vouch.compare.report import write_report
from vouch.compare.verdict import Verdict, judge

__all__ = ["Comparison", "Verdict", "compare", "judge", "write_report"]
