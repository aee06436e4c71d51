"""One style for all figures: fonts, colours that colour-blind readers can tell apart, axes, and how a figure is written."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names
from matplotlib.ticker import FuncFormatter

from pyvene_ext.io.files import atomic_path

# The first has no Chinese or Japanese; matplotlib looks for a missing character in the next, and complains of absent fonts.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Microsoft YaHei", "WenQuanYi Micro Hei")
STYLE: dict[Any, Any] = {
    "font.family": [font for font in FONTS if font in get_font_names()],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "hatch.color": "#9a9a9a",
    "hatch.linewidth": 0.6,
    "text.parse_math": False,  # a $ in a file name is a $
    "figure.constrained_layout.use": True,
    "pdf.fonttype": 42,  # text stays text: searchable, and editable in a drawing program
    "svg.fonttype": "none",
    "svg.hashsalt": "pyvene-ext",  # its ids are random otherwise
}
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
LAYERS = "cividis"
# Okabe and Ito's colours (2008), and two greys.
BLUE, ORANGE, GREY, LIGHT = "#0072b2", "#d55e00", "#6b6b6b", "#b5b5b5"
GREEN, PINK, SKY, AMBER = "#009e73", "#cc79a7", "#56b4e9", "#e69f00"

styled = matplotlib.rc_context(STYLE)

Helpful = Literal["positive", "negative"]
CHARACTERS = 110  # of one point that fit side by side into an inch, on average
SMALLEST = 6.5  # points; a title whose longest name does not fit is set smaller down to here


def signed_map(helpful: Helpful) -> str:
    """The map of two signs in which red helps the answer and blue works against it.

    Args:
        helpful: the sign of numbers that help: positive for what is lost without a head, negative for what a patch changes.

    Returns:
        The name of a colour map.
    """
    return DIVERGING if helpful == "positive" else DIVERGING.removesuffix("_r")


def fitted(text: str, inches: float, size: float) -> tuple[str, float]:
    """Break a text into lines between its words, and set it smaller where a word is longer than a line.

    Args:
        text: the text.
        inches: the width of a line.
        size: the font's size.

    Returns:
        The lines, and the size. Only a word that does not fit at the smallest size either is broken.
    """
    longest = max(map(len, text.split()), default=1)
    size = max(SMALLEST, min(size, CHARACTERS * inches / longest))
    return textwrap.fill(text, int(CHARACTERS * inches / size), break_on_hyphens=False), size


def drawable(text: str) -> bool:
    """Whether the fonts at hand have all characters of a text; else it is better named otherwise."""
    return all(character.isspace() or ord(character) in _characters() for character in text)


@cache
def _characters() -> frozenset[int]:
    return frozenset(code for font in STYLE["font.family"] for code in get_font(findfont(font)).get_charmap())


@styled
def save(figure: Figure, path: str | Path, dpi: int = 200) -> list[Path]:
    """Write a figure to a file, complete or not at all; the ending chooses the format (.png, .pdf, .svg).

    Beside a .png its .pdf is written, for papers: the same drawing, without a limit to its resolution. Equal figures give equal
    files of these three formats, byte for byte.

    Args:
        figure: drawn in the style of this package.
        path: the file.
        dpi: resolution of a .png.

    Returns:
        The files written.

    Raises:
        ValueError: the path's ending is not a format that matplotlib writes.
    """
    check_path(path)
    path = Path(path)
    ending = path.suffix.lower()
    # Without the style's layout: matplotlib would give it to a figure that has none, once that is drawn.
    with matplotlib.rc_context({"figure.constrained_layout.use": False}), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata=UNDATED.get(ending))
        if ending != ".png":
            return files_of(path)
        # Inside, so that where the PNG is, the PDF is; and laid out as it is, because every drawing moves things a little.
        pdf, engine = path.with_suffix(".pdf"), figure.get_layout_engine()
        with atomic_path(pdf) as beside, ExitStack() as after:
            if engine is not None:
                figure.set_layout_engine("none")
                after.callback(figure.set_layout_engine, engine)
            figure.savefig(beside, metadata=UNDATED[".pdf"])
    return files_of(path)


def files_of(path: Path) -> list[Path]:
    """The files that `save` writes for a path: beside a .png its .pdf."""
    return [path.with_suffix(".pdf"), path] if path.suffix.lower() == ".png" else [path]


# What would say when a file was written.
UNDATED: dict[str, dict[str, None]] = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}


def check_path(path: str | Path) -> None:
    """Raise ValueError unless `save` could write `path`'s format: for asking before hours of work, not after."""
    formats = FigureCanvasAgg.get_supported_filetypes()
    ending = Path(path).suffix.lower().removeprefix(".")
    if ending not in formats:
        raise ValueError(f"{path} does not end in a figure format; use one of .png, .pdf or .svg.")


def whole_numbers(axis: Axis, first: int, count: int) -> None:
    """Ticks on the whole numbers from `first`: all of them where there is room, else the multiples of a round step."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, count) if count <= 16 * step)
    axis.set_ticks(range(-(-first // step) * step, first + count, step))


def caption(figure: Figure, axes: Axes, title: str, xlabel: str, ylabel: str, pad: float | None = None) -> None:
    """Title and labels, broken into lines where they would leave the figure (file names can be long)."""
    width, height = figure.get_size_inches()
    titled(axes, title, width, pad)
    for label, text, inches in ((axes.set_xlabel, xlabel, width), (axes.set_ylabel, ylabel, height)):
        words, size = fitted(text, inches, STYLE["axes.labelsize"])
        label(words, fontsize=size)


def titled(axes: Axes, title: str, inches: float, pad: float | None = None) -> None:
    """A title at most this many inches wide, with no name broken across lines."""
    words, size = fitted(title, inches, STYLE["axes.titlesize"])
    axes.set_title(words, fontsize=size, pad=pad)


def over_all(figure: Figure, title: str, **options: Any) -> None:
    """A title over several panels, no name of which is broken."""
    words, size = fitted(title, figure.get_figwidth(), STYLE["axes.titlesize"])
    figure.suptitle(words, fontsize=size, **options)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend below a figure, with as many columns as are not wider than it."""

    def width(columns: int) -> float:
        rows = -(-len(labels) // columns)
        longest = [max(map(len, labels[first : first + rows])) for first in range(0, len(labels), rows)]
        return sum(0.6 + length * STYLE["legend.fontsize"] / CHARACTERS for length in longest)

    columns = next((n for n in (4, 3, 2) if n <= len(labels) and width(n) <= figure.get_figwidth()), 1)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]], size: float = 7) -> None:
    """Write names beside points, moved apart where they would lie on one another, with a line to a point that is left.

    Args:
        axes: with its limits and everything else drawn.
        points: where each name belongs.
        size: of the font.
    """
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]  # so that the axes have their size
    scale = axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    frame = axes.get_window_extent()
    taken: list[tuple[float, float, float, float]] = []
    pixels = {name: axes.transData.transform(point) / scale for name, point in points.items()}
    for name, (x, y) in sorted(pixels.items(), key=lambda item: -item[1][1]):
        width, height = 0.65 * size * len(name), 1.2 * size
        moves = [(dx, dy) for far in range(8) for dy in (-far, far) for dx in (4 + 3 * far, -4 - 3 * far - width)]
        boxes = [(x + dx, y + (dy - 0.5) * height, width, height) for dx, dy in moves]
        free = [box for box in boxes if frame.x0 / scale <= box[0] and box[0] + width <= frame.x1 / scale]
        box = next((box for box in free if not any(_overlap(box, other) for other in taken)), (free or boxes)[0])
        taken.append(box)
        offset = box[0] - x, box[1] - y + 0.2 * height
        line = {"arrowstyle": "-", "linewidth": 0.4, "color": GREY, "shrinkA": 0, "shrinkB": 2}
        moved = abs(offset[1]) > height
        axes.annotate(
            name, points[name], offset, textcoords="offset points", size=size, arrowprops=line if moved else None
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    """Whether two boxes of left, bottom, width and height do."""
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def log_axis(axes: Axes) -> None:
    """A horizontal axis in powers, its numbers written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
