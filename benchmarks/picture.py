"""docs/benchmarks.png: an epoch of each contender to the bare loop's, by batch size."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from report import PRODUCTS, faster_products, ratio

OURS, OTHERS, PAPER = "#c2410c", "#64748b", "#ffffff"
LABEL_GAP = 0.05  # least distance between two labels, as a fraction of the axis
TICKS = (0.25, 0.33, 0.5, 0.7, 1, 1.5, 2, 3, 4, 5, 6, 8, 10)


def draw(epochs: dict[str, Any], threads: int, path: Path) -> None:
    """A line for each contender, named where it begins; below 1 is faster than the bare loop."""
    sizes = sorted(map(int, epochs))
    labels = dict.fromkeys(label for group in epochs.values() for label in group)
    lines = {}
    for label in labels:
        values = [ratio(epochs[str(size)], label, "bare loop") for size in sizes]
        if all(values) and (
            label not in PRODUCTS or label == faster_products(epochs[str(sizes[0])])
        ):
            lines[label] = values

    figure = Figure(figsize=(7.6, 5.2), dpi=150, facecolor=PAPER)
    axes = figure.add_axes((0.31, 0.11, 0.62, 0.76))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(sizes[0] / 1.1, sizes[-1] * 1.1)
    every = [value for values in lines.values() for value in values]
    low, high = min(every) / 1.08, max(every) * 1.08
    axes.set_ylim(low, high)
    begins = [math.log(values[0] / low) / math.log(high / low) for values in lines.values()]
    heights = spread(begins, LABEL_GAP)
    for (label, values), begin, height in zip(lines.items(), begins, heights, strict=True):
        mine, floor = label.startswith("ours"), label in PRODUCTS
        style = {"color": OURS if mine else OTHERS, "zorder": 3 if mine else 2}
        axes.plot(
            *(sizes, values),
            **style,
            linewidth=2.2 if mine else 1.1,
            linestyle=":" if floor else "-",
            marker="o",
            markersize=5 if mine else 3,
        )
        # from the label to where its line begins
        axes.plot(
            *([-0.04, -0.005], [height, begin]),
            **style,
            linewidth=0.6,
            transform=axes.transAxes,
            clip_on=False,
        )
        axes.text(
            *(-0.05, height, "matrix products alone" if floor else label),
            color=style["color"],
            fontsize=9.5,
            fontweight="bold" if mine else "normal",
            transform=axes.transAxes,
            horizontalalignment="right",
            verticalalignment="center",
        )
    axes.yaxis.tick_right()
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in TICKS if low <= tick <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("batch size", color=OTHERS)
    axes.tick_params(length=0, colors=OTHERS)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    many = "one thread" if threads == 1 else f"{threads} threads"
    title = f"An epoch of MNIST to the bare PyTorch loop's, {many} (less is faster)"
    figure.text(0.02, 0.94, title, fontsize=11.5)
    figure.savefig(path)


def spread(heights: list[float], gap: float) -> list[float]:
    """The heights moved apart until no two are nearer than a gap, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for _ in range(200):
        for low, high in pairwise(order):
            lack = max(0.0, gap - (moved[high] - moved[low]))
            moved[low] -= lack / 2
            moved[high] += lack / 2
    return moved
