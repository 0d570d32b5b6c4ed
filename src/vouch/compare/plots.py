"""The plots of a report, as SVG text that takes its ink from the page (so that light and dark both work)."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vouch.compare.compare import Comparison

INK = "#123456"
"""Stands for the page's text colour while drawing."""
PALETTE = ("#1b9e8f", "#e07a3f", "#5b7fd1", "#c2569a", "#8a9a2b", "#a0703c", "#7a68c4", "#5d8a9e", "#d1495b", "#888888")
LENGTH_EDGES = (5, 10, 20, 50, 100)


def all_plots(comparison: Comparison) -> list[dict[str, str]]:
    """The report's plots: `{"title", "text", "svg"}` each; `text` says in words what is shown."""
    rows = [row for row in comparison.rows if row["status"] == "ok"]
    if not rows:
        return []
    metric = comparison.plan.headline
    colours = {row["method"]: PALETTE[k % len(PALETTE)] for k, row in enumerate(rows)}
    plots = [
        {
            "title": f"{metric} with 95 % intervals",
            "text": "Bars that overlap may still differ: the test in the table is paired, case by case.",
            "svg": _figure(lambda axes: _intervals(axes, rows, metric, colours), height=0.5 + 0.42 * len(rows)),
        },
        {
            "title": "Quality against cost",
            "text": "Time to fit once with the chosen settings. Up and to the left is better.",
            "svg": _figure(lambda axes: _cost(axes, rows, metric, colours), height=3.4),
        },
    ]
    by_length = ("Quality by history length", "How much a method needs to know of a person.", "events in the history")
    by_count = ("Quality by item popularity", "How it does on targets that are rare.", "training events of the target")
    groups = [
        (*by_length, comparison.history, LENGTH_EDGES),
        (*by_count, comparison.popularity, _quantile_edges(comparison.popularity)),
    ]
    for title, text, label, by, edges in groups:

        def lines(axes: Any, by: NDArray[Any] = by, edges: Any = edges, label: str = label) -> None:
            _by_group(axes, comparison, rows, metric, colours, by, edges, label)

        plots.append({"title": title, "text": text, "svg": _figure(lines, height=3.4)})
    return plots


def _figure(draw: Callable[[Any], None], *, height: float) -> str:
    import matplotlib

    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "vouch"}
    ):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.tick_params(colors=INK)
        axes.xaxis.label.set_color(INK)
        axes.yaxis.label.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # Width and height give way to the page; the view box keeps the shape.
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    return svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:href", "href")


def _intervals(axes: Any, rows: list[dict[str, Any]], metric: str, colours: dict[str, str]) -> None:
    for place, row in enumerate(reversed(rows)):
        mean, (low, high) = row["metrics"][metric], row["intervals"][metric]
        axes.barh(place, mean, color=colours[row["method"]], height=0.62, alpha=0.85)
        axes.plot([low, high], [place, place], color=INK, linewidth=1.6)
        axes.annotate(f"{mean:.4f}", (high, place), xytext=(5, 0), textcoords="offset points", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)])
    axes.set_xlabel(metric)
    axes.margins(x=0.12)


def _cost(axes: Any, rows: list[dict[str, Any]], metric: str, colours: dict[str, str]) -> None:
    # Names go above and below by turns, in order of cost, so that neighbours do not collide.
    for place, row in enumerate(sorted(rows, key=lambda row: float(row["cost"]["fit_seconds"]))):
        x, y = max(row["cost"]["fit_seconds"], 1e-3), row["metrics"][metric]
        axes.scatter(x, y, s=70, color=colours[row["method"]], zorder=3)
        shift = 9 if place % 2 == 0 else -15
        axes.annotate(row["name"], (x, y), xytext=(0, shift), textcoords="offset points", ha="center", color=INK)
    axes.set_xscale("log")
    axes.set_xlabel("seconds to fit")
    axes.set_ylabel(metric)
    axes.margins(x=0.15, y=0.18)
    axes.grid(alpha=0.2)


def _by_group(
    axes: Any,
    comparison: Comparison,
    rows: list[dict[str, Any]],
    metric: str,
    colours: dict[str, str],
    by: NDArray[Any],
    edges: Any,
    label: str,
) -> None:
    group = np.digitize(by, edges)
    present = [int(number) for number in np.unique(group)]
    names = [_range(number, edges) for number in present]
    counts = [int((group == number).sum()) for number in present]
    for row in rows:
        values = comparison.values[row["method"]][metric].mean(0)
        means = [float(values[group == number].mean()) for number in present]
        axes.plot(
            range(len(present)), means, marker="o", color=colours[row["method"]], label=row["name"], linewidth=1.8
        )
    axes.set_xticks(range(len(present)), [f"{name}\n({count:,})" for name, count in zip(names, counts, strict=True)])
    axes.set_xlabel(f"{label} (cases)")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.2, axis="y")
    legend = axes.legend(frameon=False, ncols=2, fontsize=9)
    for text in legend.get_texts():
        text.set_color(INK)


def _range(number: int, edges: Any) -> str:
    low = int(edges[number - 1]) if number else 0
    high = int(edges[number]) - 1 if number < len(edges) else None
    return f"{low}+" if high is None else str(low) if low >= high else f"{low}-{high}"


def _quantile_edges(values: NDArray[Any]) -> list[int]:
    """Edges that put about a fifth of the cases into each group."""
    if len(values) == 0:
        return [1]
    return sorted({int(edge) for edge in np.quantile(values, (0.2, 0.4, 0.6, 0.8))} - {0}) or [1]
