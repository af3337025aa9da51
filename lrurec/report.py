"""A bundle as a picture: how its training went, and what its recurrence remembers.

Drawn from the bundle alone, so it can be drawn at any time and is the same every time. Needs matplotlib, which is in
the extra `report`; nothing else in lrurec does.
"""

import html
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from lrurec.bundle import Bundle
from lrurec.errors import ReportError
from lrurec.model import Block

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = {"recall@10": "#0072b2", "ndcg@10": "#d55e00", "recall@20": "#56b4e9", "ndcg@20": "#e69f00"}
"""Of a validation, and a colour for each that the colour-blind can tell apart (Okabe and Ito's)."""

BLOCK_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

BEST_COLOUR = "#444444"

_BEYOND_PLOTS = 1e15
"""No training has so many steps nor such a loss, and an axis so long cannot be drawn."""

BINS = 24
"""Of a histogram: a block has 2d channels, and the published d is 64."""

LINE_POINTS = 15
"""Height of a line of a legend, which stands between a panel's title and its axes, where it hides nothing."""

_PIXELS_PER_INCH = 130


def require_drawable(path: Path, bundle_folder: Path) -> None:
    """Raise `ReportError` unless a report on a bundle may be written here. To be asked before a training, not after it.

    Not into the bundle's own folder: what is no bundle's file would keep it from being replaced.
    """
    if bundle_folder.absolute() in (path.absolute(), *path.absolute().parents):
        raise ReportError(f"{path} is in the folder of the bundle, {bundle_folder}; name a file elsewhere")
    _require_file(path)


def _require_file(path: Path) -> None:
    if path.suffix.lower() not in _WRITERS:
        raise ReportError(f"{path} ends in {path.suffix!r}; a report can be {', '.join(_WRITERS)}")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ReportError(f"{path} cannot be written: it must be a file in a folder that is there; name another")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ReportError(f"{path} cannot be written: permission denied; name another file")
    if find_spec("matplotlib") is None:
        raise ReportError("a report needs matplotlib, which is not installed; pip install 'stream-app[report]'")


def write_report(path: Path, bundle: Bundle, name: str) -> None:
    """Draw a bundle into a file: .html (one file that needs no network), .png or .svg. `name` is for its title.

    Raises `ReportError` for another kind of file, one that can't be written, or metadata that hold no training curve
    of ours.
    """
    _require_file(path)
    content = _WRITERS[path.suffix.lower()](bundle, name)
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ReportError(f"{path} cannot be written: {error.strerror}; name another file") from error


def draw(bundle: Bundle, name: str) -> "Figure":
    """Above, where the bundle was trained here: loss and validation by step. Below: |λ| and the phase of λ, a block.

    A converted bundle has no curve; then the lower half is all.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - it takes a second, and most commands draw nothing

    curve = _curve(bundle)
    figure = Figure(figsize=(11, 7.6 if curve else 4.4), layout="constrained")
    title = f"{name}, version {bundle.version}"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="x-large", parse_math=False)
    axes = figure.subplots(2 if curve else 1, 2, squeeze=False)
    if curve:
        _draw_loss(axes[0, 0], curve)
        _draw_validation(axes[0, 1], curve, bundle.metadata.get("best_step", 0))
    eigenvalues = [block.lru.eigenvalues().numpy() for block in cast("Sequence[Block]", bundle.model.blocks)]
    _draw_memory(axes[-1, 0], eigenvalues)
    _draw_phase(axes[-1, 1], eigenvalues)
    for axis in axes.flat:
        axis.grid(visible=True, alpha=0.25)
    return figure


def _curve(bundle: Bundle) -> Sequence[Mapping[str, Any]]:
    """The training curve, checked: a bundle's metadata may be anybody's. Empty where there is none."""
    curve, best_step = bundle.metadata.get("curve", []), bundle.metadata.get("best_step", 0)
    try:
        numbers = [
            [p["step"], p["loss"], p["learning_rate"], *(p["validation"][name] for name in METRICS)] for p in curve
        ]
        values = np.array(numbers)
        sound = 0 <= best_step < _BEYOND_PLOTS and bool((np.abs(values) < _BEYOND_PLOTS).all()) and values.ndim < 3
    except (KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise ReportError("the bundle's metadata hold a training curve that is none of ours; train the model again")
    return cast("Sequence[Mapping[str, Any]]", curve)


def _draw_loss(axis: "Axes", curve: Sequence[Mapping[str, Any]]) -> None:
    steps = [point["step"] for point in curve]
    (loss,) = axis.plot(steps, [point["loss"] for point in curve], ".-", color="black", label="loss, a running mean")
    axis.set_xlabel("step")
    axis.set_ylabel("cross entropy, nats a click")
    rates = axis.twinx()
    rate = rates.fill_between(
        steps, [point["learning_rate"] for point in curve], color="gray", alpha=0.15, linewidth=0, label="learning rate"
    )
    rates.set_ylim(bottom=0)
    rates.set_ylabel("learning rate", color="gray")
    rates.tick_params(axis="y", colors="gray")
    _head(axis, "Training loss", [loss, rate])


def _draw_validation(axis: "Axes", curve: Sequence[Mapping[str, Any]], best_step: int) -> None:
    steps = [point["step"] for point in curve]
    lines: list[Artist] = []
    for name, colour in METRICS.items():
        lines += axis.plot(steps, [point["validation"][name] for point in curve], ".-", color=colour, label=name)
    best = next((point["validation"]["recall@10"] for point in curve if point["step"] == best_step), None)
    title = "Validation"
    if best is not None:
        title += f": best recall@10 {best:.4f} at step {best_step:,}"
        axis.axvline(best_step, color=BEST_COLOUR, linestyle="--", linewidth=1)
        axis.plot([best_step], [best], "*", color=BEST_COLOUR, markersize=14)
    axis.set_xlabel("step")
    axis.set_ylabel("mean over users")
    axis.set_ylim(bottom=0)
    _head(axis, title, lines)


def _draw_memory(axis: "Axes", eigenvalues: Sequence[np.ndarray]) -> None:
    sizes = [np.abs(values) for values in eigenvalues]
    low = math.floor(20 * min(float(size.min()) for size in sizes)) / 20
    labels = [f"block {k + 1}: median {np.median(size):.3f}, max {size.max():.4f}" for k, size in enumerate(sizes)]
    lines = _draw_histograms(axis, sizes, (low, 1), labels)
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:.2f}\n{_half_life(size)}")
    axis.set_xlabel("|λ|; below it, clicks until half is forgotten")
    _head(axis, "Memory: |λ| of every channel", lines, columns=2)


def _half_life(size: float) -> str:
    """Clicks until |λ|ⁿ is a half."""
    if not 0 < size < 1:
        return "∞" if size >= 1 else "0"
    return f"{math.log(0.5) / math.log(size):.2g}"


def _draw_phase(axis: "Axes", eigenvalues: Sequence[np.ndarray]) -> None:
    phases = [np.angle(values) for values in eigenvalues]
    lines = _draw_histograms(axis, phases, (-math.pi, math.pi), [f"block {k + 1}" for k in range(len(phases))])
    ticks = {-1.0: "−π", -0.5: "−π/2", 0.0: "0", 0.5: "π/2", 1.0: "π"}
    axis.set_xticks([math.pi * turn for turn in ticks], list(ticks.values()))
    axis.set_xlabel("arg λ, radians a click\n0 sums up; ±π changes the sign at every click")
    _head(axis, "Rhythm: phase of every channel", lines)


def _draw_histograms(
    axis: "Axes", columns: Sequence[np.ndarray], within: tuple[float, float], labels: Sequence[str]
) -> "list[Artist]":
    """One over the other, a colour for each."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - as in `draw`

    outlines: list[Artist] = []
    for block, (values, label) in enumerate(zip(columns, labels, strict=True)):
        counts, edges = np.histogram(values, BINS, within)
        colour = BLOCK_COLOURS[block % len(BLOCK_COLOURS)]
        axis.stairs(counts, edges, fill=True, alpha=0.2, color=colour)
        outlines.append(axis.stairs(counts, edges, color=colour, linewidth=1.8, label=label))
    axis.set_xlim(within)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("channels")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return outlines


def _head(axis: "Axes", title: str, lines: "Sequence[Artist]", columns: int = 4) -> None:
    """A title, and the legend under it."""
    rows = -(-len(lines) // columns)
    axis.set_title(title, loc="left", pad=LINE_POINTS * rows + 8, fontsize="medium", fontweight="bold")
    legend = axis.legend(
        handles=lines,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.3,
        columnspacing=1.2,
        frameon=False,
        fontsize="small",
    )
    legend.set_in_layout(False)  # a wide one must not make the axes narrow


def _png(bundle: Bundle, name: str) -> bytes:
    return _saved(draw(bundle, name), "png")


def _svg(bundle: Bundle, name: str) -> bytes:
    return _saved(draw(bundle, name), "svg")


def _saved(figure: "Figure", kind: str) -> bytes:
    from matplotlib import rc_context  # noqa: PLC0415 - as in `draw`

    content = io.BytesIO()
    # No date and no random ids: the same bundle gives the same bytes.
    with rc_context({"svg.hashsalt": "lrurec"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name may be in any script; it is a title only
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(content, format=kind, dpi=_PIXELS_PER_INCH, metadata=metadata)
    return content.getvalue()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; vertical-align: top; padding: .15em 1.2em .15em 0; font-weight: normal; }}
th {{ color: #666; }}
summary {{ cursor: pointer; margin-top: 1.5em; }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1em; }}
</style>
</head>
<body>
<table>
{rows}
</table>
{picture}
<details>
<summary>All that the bundle says about its training</summary>
<pre>{metadata}</pre>
</details>
</body>
</html>
"""


def _html(bundle: Bundle, name: str) -> bytes:
    picture = _svg(bundle, name).decode()
    rows = "\n".join(
        f"<tr><th>{html.escape(what)}</th><td>{html.escape(text)}</td></tr>" for what, text in _facts(bundle)
    )
    page = _PAGE.format(
        title=html.escape(f"{name} {bundle.version}"),
        rows=rows,
        picture=picture[picture.index("<svg") :],  # without the XML declaration, which HTML has no place for
        metadata=html.escape(json.dumps(bundle.metadata, indent=2, ensure_ascii=False)),
    )
    return page.encode(errors="replace")  # metadata may be anybody's, with halves of characters


def _facts(bundle: Bundle) -> Iterator[tuple[str, str]]:
    config, metadata = bundle.config, bundle.metadata
    yield "model", f"d = {config.hidden_units}, {config.num_blocks} blocks, {config.num_items:,} items"
    match metadata:
        case {"data": {"users": int(users), "items": int(items), "clicks": int(clicks), "fingerprint": str(data)}}:
            yield "data", f"{clicks:,} clicks of {users:,} users on {items:,} items, fingerprint {data}"
    match metadata:
        case {"metrics": {"validation": dict(validation), "test": dict(test)}}:
            yield "validation", _metrics_line(validation)
            yield "test", _metrics_line(test)
    match metadata:
        case {"versions": dict(versions)}:
            yield "made by", ", ".join(f"{program} {version}" for program, version in versions.items())


def _metrics_line(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in metrics.items())


_WRITERS: dict[str, Callable[[Bundle, str], bytes]] = {".html": _html, ".png": _png, ".svg": _svg}
