"""The race's picture."""

import itertools

from matplotlib.figure import Figure

from benchmarks.race.names import keep_apart


def test_no_name_of_the_picture_lies_over_another() -> None:
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    points = {"muon": (0.85, 18.3), "normuon": (0.88, 18.4), "racs": (12.7, 21.35), "sinkgd": (12.6, 21.31)}
    points |= {"adamw": (26.8, 21.2), "adamw-again": (26.8, 21.1), "scale": (3.2, 25.2), "apollo": (16.1, 21.9)}
    for name, (x, y) in points.items():
        axes.plot(x, y, "o")
        axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log")
    axes.margins(0.15)
    keep_apart(figure)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent().shrunk(1.0, 0.9) for text in axes.texts]
    assert len(boxes) == len(points)
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
