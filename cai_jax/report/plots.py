"""Inline SVG plots. Colours are CSS variables, so that one drawing serves light, dark and print."""

import io
import math
import re

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cai_jax.report.artifacts import MODELS
from cai_jax.report.markup import Html, el, escape
from cai_jax.report.numbers import known, part, percent

MOST_POINTS = 300  # of a curve; longer ones are averaged in equal blocks
MOST_DOTS = 600  # of a scatter plot
LEGEND_COLUMNS = 4  # more entries stand in two rows

# Each stands in the drawing for the CSS variable of its name, replaced after drawing.
_COLOURS = {
    "ink": "#0a0b0c",
    "grid": "#c7c6c5",
    "c0": "#8a8b8d",
    "c1": "#1f77b5",
    "c2": "#d95f03",
    "c3": "#7571b4",
    "c4": "#1b9e78",
    "c5": "#a6761e",
}
CYCLE = [_COLOURS[name] for name in ("c1", "c2", "c3", "c0")]
MODEL_COLOURS = {model: _COLOURS[f"c{place}"] for place, model in enumerate(MODELS)}
DASHES = ["-", "--", ":", "-."]
_STYLE = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": _COLOURS["ink"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.edgecolor": _COLOURS["ink"],
    "xtick.color": _COLOURS["ink"],
    "ytick.color": _COLOURS["ink"],
    "grid.color": _COLOURS["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "axes.formatter.useoffset": False,
}


def figure(name: str, caption: str, draw) -> Html:
    """A figure: `draw(axes)` fills one panel; `name` makes its ids unique on the page.

    Panels are small and of one size: side by side on a wide page, one below the other on a phone, where
    their letters are still as large as the text's.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        canvas = Figure(figsize=(3.6, 2.35))
        canvas.subplots_adjust(left=0.165, right=0.985, bottom=0.175, top=0.9)
        draw(canvas.subplots())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return el("figure", Html(_inline(buffer.getvalue(), name, caption)), el("figcaption", caption))


def _inline(svg: str, name: str, caption: str) -> str:
    """Strip what only a file needs, prefix the ids, turn colours into variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = svg.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    for colour, value in _COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    opening = re.match(r"<svg[^>]*>", svg).group()
    view_box = re.search(r'viewBox="[^"]*"', opening).group()
    return f'<svg {view_box} role="img" aria-label="{escape(caption)}">{svg[len(opening):]}'


def _percent_ticks() -> FuncFormatter:
    return FuncFormatter(lambda share, _: f"{100 * share:.3g}%")


def _legend(axes, entries: int) -> None:
    if entries > 1:
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=entries if entries <= LEGEND_COLUMNS else -(-entries // 2),
            borderaxespad=0,
            handlelength=1.4,
            handletextpad=0.5,
            columnspacing=1.0,
            fontsize=7.5,
        )


def _thin(xs: list, ys: list) -> tuple[list, list]:
    """At most MOST_POINTS points: means of equal blocks, over the values that exist."""
    size = math.ceil(len(xs) / MOST_POINTS)
    if size <= 1:
        return xs, ys
    thin_xs, thin_ys = [], []
    for start in range(0, len(xs), size):
        block = [y for y in ys[start : start + size] if not math.isnan(y)]
        thin_xs.append(xs[min(start + size // 2, len(xs) - 1)])
        thin_ys.append(sum(block) / len(block) if block else math.nan)
    return thin_xs, thin_ys


def curves(
    name: str, caption: str, metrics: list[dict], x: str, keys: dict[str, str], share: bool = False
) -> Html:
    """Metric lines against a step: `keys` maps a metric to its label; '' when no metric has a value."""
    if len(metrics) > MOST_POINTS:
        caption += f"; each point is the mean of {math.ceil(len(metrics) / MOST_POINTS)} {x}s"
    series = {}
    for key, label in keys.items():
        ys = [float(line[key]) if known(line.get(key)) else math.nan for line in metrics]
        if not all(map(math.isnan, ys)):
            xs = [line[x] if known(line.get(x)) else place for place, line in enumerate(metrics, 1)]
            series[label] = _thin(xs, ys)
    if not series:
        return Html("")

    def draw(axes):
        for place, (label, (xs, ys)) in enumerate(series.items()):
            axes.plot(
                xs,
                ys,
                DASHES[place],
                color=CYCLE[place],
                label=label,
                marker="o" if len(xs) <= 30 else "",
                markersize=2.5,
            )
        axes.set_xlabel(x)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        if share:
            axes.yaxis.set_major_formatter(_percent_ticks())
            axes.set_ylim(bottom=0)
        _legend(axes, len(series))

    return figure(name, caption, draw)


def two_scales(
    name: str, caption: str, xs: list, series: dict[str, list], x: str, mark: float | None = None
) -> Html:
    """Two series of INTERVALs with their bands over the same steps, each on a scale of its own; '' without a value.

    `series` maps two labels to one INTERVAL (or None) a step: the first is read on the left, the second on the right.
    `mark`: a step to be marked by a line.
    """
    if not any(part(interval) is not None for intervals in series.values() for interval in intervals):
        return Html("")

    def draw(left):
        left.figure.subplots_adjust(right=0.845)
        right = left.twinx()
        right.spines["right"].set_visible(True)
        right.grid(visible=False)
        lines = []
        for place, (axes, (label, intervals)) in enumerate(zip((left, right), series.items(), strict=True)):
            edges = [[_or_nan(part(interval, key)) for interval in intervals] for key in ("value", "low", "high")]
            (line,) = axes.plot(
                xs, edges[0], DASHES[place], color=CYCLE[place], label=label, marker="o", markersize=2.5
            )
            axes.fill_between(xs, edges[1], edges[2], color=CYCLE[place], alpha=0.15, linewidth=0)
            axes.tick_params(axis="y", colors=CYCLE[place])
            lines.append(line)
        if known(mark):
            left.axvline(mark, color=_COLOURS["ink"], linewidth=0.8, linestyle=":")
        left.set_xlabel(x)
        left.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        left.legend(
            handles=lines, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, borderaxespad=0, fontsize=7.5
        )

    return figure(name, caption, draw)


def _or_nan(value) -> float:
    return math.nan if value is None else value


def grouped_bars(name: str, caption: str, groups: dict[str, dict], share: bool = False) -> Html:
    """Bars with 95% intervals: {group label: {model: INTERVAL}}; a missing value leaves a gap."""
    models = [model for model in MODEL_COLOURS if any(model in bars for bars in groups.values())]

    def draw(axes):
        width = 0.8 / max(len(models), 1)
        for place, model in enumerate(models):
            drawn = False
            for at, bars in enumerate(groups.values()):
                value = part(bars.get(model))
                if value is None:
                    continue
                x = at + (place - (len(models) - 1) / 2) * width
                axes.bar(
                    x, value, width * 0.92, color=MODEL_COLOURS[model], label=None if drawn else MODELS[model]
                )
                top = _whisker(axes, x, value, bars[model])
                axes.annotate(
                    percent(value) if share else f"{value:.3g}",
                    (x, top),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=6.5,
                    rotation=90 if len(models) > 3 else 0,
                )
                drawn = True
        axes.set_xticks(range(len(groups)), list(groups))
        axes.grid(axis="x", visible=False)
        if share:
            axes.set_ylim(0, 1.12 if len(models) <= 3 else 1.22)
            axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
            axes.yaxis.set_major_formatter(_percent_ticks())
        else:
            axes.margins(y=0.14 if len(models) <= 3 else 0.22)  # room for the labels above the bars
        if len(models) > LEGEND_COLUMNS:
            axes.figure.subplots_adjust(top=0.83)
        _legend(axes, len(models))

    return figure(name, caption, draw)


def _whisker(axes, x: float, value: float, interval: dict) -> float:
    """Draw the interval where it is known; the height above which there is room for a label."""
    low, high = part(interval, "low"), part(interval, "high")
    if low is None or high is None:
        return value
    axes.vlines(x, low, high, color=_COLOURS["ink"], linewidth=0.8)
    return max(value, high)


def bars(name: str, caption: str, series: dict[str, list], ticks: list, x: str, share: bool = False) -> Html:
    """Bars beside each other, one series a colour: {label: one value a tick}."""

    def draw(axes):
        width = 0.8 / max(len(series), 1)
        for place, (label, values) in enumerate(series.items()):
            offset = (place - (len(series) - 1) / 2) * width
            axes.bar(
                [at + offset for at in range(len(ticks))],
                values,
                width * 0.92,
                color=CYCLE[place],
                label=label,
            )
        axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel(x)
        if share:
            axes.set_ylim(0, max([1e-9, *[value for values in series.values() for value in values]]) * 1.15)
            axes.yaxis.set_major_formatter(_percent_ticks())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(axes, len(series))

    return figure(name, caption, draw)


def boxes(name: str, caption: str, groups: dict[str, list], y: str) -> Html:
    """Median, quartiles and 5th to 95th percentile of each group."""
    groups = {label: values for label, values in groups.items() if values}
    if not groups:
        return Html("")

    def draw(axes):
        line = {"color": _COLOURS["ink"], "linewidth": 0.8}
        axes.boxplot(
            list(groups.values()),
            tick_labels=list(groups),
            whis=(5, 95),
            showfliers=False,
            widths=0.55,
            patch_artist=True,
            boxprops={"facecolor": _COLOURS["c1"], "edgecolor": _COLOURS["ink"]},
            medianprops={**line, "linewidth": 1.6},
            whiskerprops=line,
            capprops=line,
        )
        axes.set_ylim(bottom=0)
        axes.set_ylabel(y)
        axes.grid(axis="x", visible=False)

    return figure(name, caption, draw)


def histogram(name: str, caption: str, edges: list, counts: list, x: str) -> Html:
    """Bars between given edges."""

    def draw(axes):
        widths = [right - left for left, right in zip(edges[:-1], edges[1:], strict=True)]
        axes.bar(
            edges[:-1],
            counts,
            widths,
            align="edge",
            color=_COLOURS["c1"],
            edgecolor=_COLOURS["ink"],
            linewidth=0.4,
        )
        axes.set_xlabel(x)
        axes.set_ylabel("pairs")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="x", visible=False)

    return figure(name, caption, draw)


def outlines(name: str, caption: str, groups: dict[str, list], x: str, span: tuple[float, float]) -> Html:
    """Histograms of several groups over each other, each as a share of its own group."""
    groups = {label: values for label, values in groups.items() if values}
    if not groups:
        return Html("")

    def draw(axes):
        for place, (label, values) in enumerate(groups.items()):
            axes.hist(
                values,
                bins=16,
                range=span,
                weights=[1 / len(values)] * len(values),
                histtype="step",
                color=CYCLE[1 - place],
                linestyle=DASHES[place],
                linewidth=1.4,
                label=f"{label} (n {len(values)})",
            )
        axes.axvline(0, color=_COLOURS["ink"], linewidth=0.6)
        axes.set_xlabel(x)
        axes.yaxis.set_major_formatter(_percent_ticks())
        _legend(axes, 2)

    return figure(name, caption, draw)


def dots(name: str, caption: str, xs: list, ys: list, x: str, y: str) -> Html:
    """Shares against shares, with the diagonal on which both agree."""
    if not xs:
        return Html("")

    def draw(axes):
        axes.plot([0, 1], [0, 1], color=_COLOURS["ink"], linewidth=0.7, linestyle=":")
        axes.scatter(xs[:MOST_DOTS], ys[:MOST_DOTS], s=9, color=_COLOURS["c1"], alpha=0.6, linewidths=0)
        _unit_square(axes, x, y)

    return figure(name, caption, draw)


def reliability(name: str, caption: str, bins: list[dict]) -> Html:
    """Observed against predicted share of each bin; a marker's area grows with the pairs in it."""
    filled = [cell for cell in bins if known(cell.get("predicted")) and known(cell.get("observed"))]
    if not filled:
        return Html("")
    most = max(cell.get("n") or 1 for cell in filled)

    def draw(axes):
        axes.plot([0, 1], [0, 1], color=_COLOURS["ink"], linewidth=0.7, linestyle=":")
        predicted, observed = [cell["predicted"] for cell in filled], [cell["observed"] for cell in filled]
        axes.plot(predicted, observed, color=_COLOURS["c1"], linewidth=0.8)
        axes.scatter(
            predicted,
            observed,
            s=[12 + 70 * (cell.get("n") or 1) / most for cell in filled],
            color=_COLOURS["c1"],
            linewidths=0,
        )
        for cell in filled:
            axes.annotate(
                f"n {cell.get('n')}",
                (cell["predicted"], cell["observed"]),
                (6, -8),
                textcoords="offset points",
                fontsize=6.5,
            )
        _unit_square(axes, "predicted", "observed")

    return figure(name, caption, draw)


def _unit_square(axes, x: str, y: str) -> None:
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel=x, ylabel=y)
