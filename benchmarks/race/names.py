"""Names beside the points of a picture, none over another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 7  # of the letters, in points
WIDTH, HEIGHT = 0.55 * SIZE, 1.3 * SIZE  # of a letter and of a line, about
PANEL = (400.0, 300.0)  # points across and up, about: the layout settles it later


def name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Write each name beside its point, from below: one that would lie over a lower one is moved above it.

    Call it when the scale, the margins and all else that sets the limits are set.
    """
    to_panel = axes.transScale + axes.transLimits
    taken: list[tuple[float, float, float]] = []  # left, right and bottom, in points
    for name, at in sorted(points.items(), key=lambda item: item[1][::-1]):
        x, y = (float(share) * length for share, length in zip(to_panel.transform(at), PANEL, strict=True))
        left, right, bottom = x, x + WIDTH * len(name), y
        for start, end, low in sorted(taken, key=lambda other: other[2]):
            if left < end and start < right and abs(bottom - low) < HEIGHT:
                bottom = low + HEIGHT
        taken.append((left, right, bottom))
        axes.annotate(name, at, xytext=(4, 4 + bottom - y), textcoords="offset points", fontsize=SIZE)
