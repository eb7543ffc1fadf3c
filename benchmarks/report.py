"""From the figures of benchmarks/run.py to Markdown: medians, and medians of ratios."""

import statistics
from collections.abc import Iterator
from typing import Any

Figures = dict[str, Any]
PRODUCTS = ("products, torch", "products, numpy")


def median(figures: Figures, label: str, name: str = "seconds") -> float | None:
    """The median of one contender's figures, None where there are none."""
    values = figures.get(label, {}).get(name)
    return statistics.median(values) if values else None


def ratio(figures: Figures, one: str, other: str, name: str = "seconds") -> float | None:
    """The median of two contenders' ratios, round by round, None where there are none."""
    pair = [figures.get(label, {}).get(name) for label in (one, other)]
    if not all(pair):
        return None
    return statistics.median(a / b for a, b in zip(*pair, strict=True))


def faster_products(figures: Figures) -> str:
    """Which library's matrix products take the least."""
    return min(PRODUCTS, key=lambda label: median(figures, label) or float("inf"))


def spell(value: float | None, digits: int = 2) -> str:
    """A number for a cell."""
    return "" if value is None else f"{value:.{digits}f}"


def row(cells: list[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


def markdown(machine: Figures, threads: int, measured: Figures) -> str:
    """The tables of all sections that were measured."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["packages"].items() if v)
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {threads} of them used for training; "
        f"Python {machine['python']}, {versions}.",
    ]
    groups = {f"MLP, {size}": group for size, group in measured.get("epochs", {}).items()}
    groups |= {f"convnet, {size}": group for size, group in measured.get("convnet", {}).items()}
    if groups:
        lines += ["", "An epoch, validation included, to the bare loop's (net, batch size):", ""]
        lines += epoch_table(groups)
    facts = [
        fact for name, tell in FACTS.items() if name in measured for fact in tell(measured[name])
    ]
    if facts:
        lines += ["", row(["what", "measured"]), row(["---"] * 2)]
        lines += [row(list(fact)) for fact in facts]
    skipped = {
        f"{label}: {figures['skipped']}"
        for group in [*groups.values(), measured.get("startup", {})]
        for label, figures in group.items()
        if "skipped" in figures
    }
    return "\n".join([*lines, *(f"\nLeft out: {reason}" for reason in sorted(skipped))])


def epoch_table(groups: dict[str, Figures]) -> list[str]:
    """Contenders by nets and batch sizes: ratios to the bare loop, in whose row are its seconds."""
    told = groups.get("MLP, 64", {})
    labels = list(dict.fromkeys(label for group in groups.values() for label in group))
    heads = [*groups, "until the first epoch's end", "accuracy"] if told else [*groups]
    lines = [row(["", *heads]), row(["---"] + ["---:"] * len(heads))]
    for label in labels:
        cells = [
            f"{spell(median(group, label))} s"
            if label == "bare loop"
            else spell(ratio(group, label, "bare loop"))
            for group in groups.values()
        ]
        if told:
            first, accuracies = (told.get(label, {}).get(name) for name in ("first", "accuracy"))
            cells.append(f"{first:.1f} s" if first else "")
            cells.append(spell(accuracies[-1] if accuracies else None, 3))
        lines.append(row([label, *cells]))
    return lines


def memory(epochs: Figures) -> Iterator[tuple[str, str]]:
    """Memory of whole processes at batch 64: the most there was, and what stays after an epoch."""
    group = epochs.get("64", {})
    for label in ("ours", "ours, compiled"):
        for name, words in {"peak_mib": "peak", "resident_mib": "resident"}.items():
            both = [median(group, one, name) for one in (label, "bare loop")]
            if all(both):
                yield (
                    f"{words} memory, {label}, to the bare loop",
                    f"{both[0]:.0f} to {both[1]:.0f} MiB",
                )


def startup(figures: Figures) -> Iterator[tuple[str, str]]:
    """Seconds, and what they are to an import that nobody can do without."""
    for label in figures:
        base = "import torch" if "step" in label else "import hydra"
        if label.startswith("import"):
            yield f"`python -c '{label}'`", f"{spell(median(figures, label))} s"
        elif median(figures, label):
            yield (
                f"from the shell to {label}",
                f"{spell(median(figures, label))} s, "
                f"{spell(ratio(figures, label, base))} times `{base}`",
            )


def tracking(figures: Figures) -> Iterator[tuple[str, str]]:
    """Thousandths of a second, and hundredths of an epoch."""
    names = {"log": "logging", "sync": "flushing logs to disk", "save": "checkpoints"}
    for name, words in names.items():
        seconds = median(figures, "ours", name)
        epoch = median(figures, "ours")
        if seconds and epoch:
            yield (
                f"{words}, of an epoch of {epoch:.2f} s",
                f"{1000 * seconds:.1f} ms, {100 * seconds / epoch:.2f} %",
            )


def growth(figures: Figures) -> Iterator[tuple[str, str]]:
    """Time for each row, and the memory of the whole process."""
    for rows, group in figures.items():
        spans = [median(group, label) for label in ("ours", "bare loop")]
        peaks = [median(group, label, "peak_mib") for label in ("ours", "bare loop")]
        if all(spans) and all(peaks):
            each = " to ".join(f"{1e6 * seconds / int(rows):.2f}" for seconds in spans)
            whole = " to ".join(f"{mib:.0f}" for mib in peaks)
            yield (
                f"{int(rows):,} narrow rows, ours to the bare loop",
                f"{each} µs a row, {whole} MiB at the peak",
            )


def sweep(figures: Figures) -> Iterator[tuple[str, str]]:
    """Seconds of all runs, and what they are to ours."""
    for line in figures.get("contenders", []):
        yield (
            f"sweep of 16 runs, {line['contender']}",
            f"{line['seconds']} s, {line['to ours']} times ours",
        )


FACTS = {
    "startup": startup,
    "epochs": memory,
    "tracking": tracking,
    "growth": growth,
    "sweep": sweep,
}


def too_inaccurate(measured: Figures, least: float) -> list[str]:
    """Who did not reach an accuracy in the end, so that none is fast by doing less."""
    return [
        f"{label} ({section}, batch {size}): {figures['accuracy'][-1]}"
        for section in ("epochs", "convnet")
        for size, group in measured.get(section, {}).items()
        for label, figures in group.items()
        if label not in PRODUCTS and "skipped" not in figures and figures["accuracy"][-1] < least
    ]
