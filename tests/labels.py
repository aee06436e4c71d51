"""Whether a figure says what its axes are."""

from __future__ import annotations

from matplotlib.figure import Figure


def unlabelled(figure: Figure) -> list[str]:
    """The axes without a label that a reader would look for: panels side by side may share one, as may panels in a column."""
    missing = []
    panels = [axes for axes in figure.axes if axes.axison]
    for number, axes in enumerate(panels):
        if getattr(axes, "_colorbar", None) is not None:
            if not (axes.get_ylabel() or axes.get_xlabel()):
                missing.append(f"colour bar {number}")
            continue
        place = axes.get_subplotspec()
        for name in "xy":
            shared = [
                other
                for other in panels
                if place is not None
                and (at := other.get_subplotspec()) is not None
                and (at.colspan == place.colspan if name == "x" else at.rowspan == place.rowspan)
            ]
            if not any(getattr(other, f"get_{name}label")() for other in [axes, *shared]):
                missing.append(f"{name} axis of panel {number}")
    return missing
