"""One style for all figures: fonts, colours that colour-blind readers can tell apart, axes, and how a figure is written."""

from __future__ import annotations

import textwrap
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

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
            return [path]
        # Inside, so that where the PNG is, the PDF is; and laid out as it is, because every drawing moves things a little.
        pdf, engine = path.with_suffix(".pdf"), figure.get_layout_engine()
        with atomic_path(pdf) as beside, ExitStack() as after:
            if engine is not None:
                figure.set_layout_engine("none")
                after.callback(figure.set_layout_engine, engine)
            figure.savefig(beside, metadata=UNDATED[".pdf"])
    return [pdf, path]


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
    axes.set_title(textwrap.fill(title, int(11 * width)), pad=pad)
    axes.set_xlabel(textwrap.fill(xlabel, int(11 * width)))
    axes.set_ylabel(textwrap.fill(ylabel, int(11 * height)))


def log_axis(axes: Axes) -> None:
    """A horizontal axis in powers, its numbers written out."""
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
