"""Draw charts as SVG with matplotlib, which the extra ``benchmarks`` installs."""

from __future__ import annotations

from pathlib import Path

from comparing import Chart


def draw(chart: Chart, directory: Path) -> Path:
    """Write a chart, and return its file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    for (name, points), marker in zip(chart.lines.items(), "osD^vPX*", strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.set_xscale("log", base=chart.x_base)
    axes.set_yscale("log")
    places = sorted({x for points in chart.lines.values() for x, _ in points})
    axes.set_xticks(places, [f"{x:,}" for x in places])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    path = directory / f"{chart.file_name}.svg"
    figure.savefig(path)
    return path
