"""Names beside the points of a picture, none over another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox


def keep_apart(figure: Figure) -> None:
    """Move each annotation that lies over a lower one of its panel above it. All else must be drawn already."""
    from matplotlib.text import Annotation

    figure.draw_without_rendering()  # settles the layout
    for axes in figure.axes:
        placed: list[Bbox] = []  # the lowest first
        names = [(text.get_window_extent(), text) for text in axes.texts if isinstance(text, Annotation)]
        for box, text in sorted(names, key=lambda name: name[0].y0):
            rise = 0.0
            for below in sorted(placed, key=lambda other: other.y0):
                if box.translated(0, rise).overlaps(below):
                    rise = below.y1 - box.y0
            placed.append(box.translated(0, rise))
            x, y = text.xyann
            text.xyann = (x, y + rise * 72 / figure.dpi)  # of pixels, points
