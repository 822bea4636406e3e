"""Draw writing.svg and convert.svg: how files become data sets and predictions."""
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

from iceaggr.style import BLUE, GREEN, GREY, ORANGE, PINK


def box(ax, x, y, text, colour, width=2.6, height=0.7, note=None):
    "A rounded box with a text, and a smaller line below it."
    shape = dict(boxstyle="round,pad=0.12", fc=colour, alpha=0.15, ec="none")
    ax.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, **shape))
    centred = dict(ha="center", va="center")
    ax.text(x, y + (0.12 if note else 0), text, fontsize=9, color=colour, weight="bold", **centred)
    if note: ax.text(x, y - 0.2, note, fontsize=7.5, color=GREY, **centred)


def arrow(ax, start, end):
    ax.annotate("", xy=end, xytext=start, arrowprops=dict(arrowstyle="->", color=GREY))


def canvas(width, height):
    figure, ax = plt.subplots(figsize=(width, height))
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax


def save(figure, name):
    figure.savefig(Path(__file__).with_name(name), bbox_inches="tight", facecolor="white")


def draw_writing():
    figure, ax = canvas(9, 3.6)
    for y, name in ((2.9, "file or run 1"), (1.8, "file or run 2"), (0.7, "...")):
        box(ax, 1.5, y, name, BLUE, note="pulses, truth" if "run" in name else None)
        arrow(ax, (2.9, y), (3.55, 1.8))
    box(ax, 4.5, 1.8, "write_dataset", ORANGE, 1.7, note="checks, numbers")
    files = ("train/batch_1.parquet, ...", "train_meta.parquet", "truth.parquet", "sources.parquet",
             "skipped.csv", "sensor_geometry.csv")
    for k, name in enumerate(files):
        y = 3.2 - 0.56 * k
        arrow(ax, (5.55, 1.8), (6.15, y))
        box(ax, 7.5, y, name, GREEN, 2.5, 0.22)
    save(figure, "writing.svg")


def draw_convert():
    figure, ax = canvas(9, 3.9)
    formats = ("i3", "GraphNeT, SQLite", "GraphNeT, Parquet", "Prometheus", "CSV", "Parquet")
    for k, name in enumerate(formats):
        y = 3.5 - 0.62 * k
        box(ax, 1.3, y, name, BLUE, 2.2, 0.26)
        arrow(ax, (2.55, y), (3.4, 1.95))
    box(ax, 4.3, 1.95, "read_events", ORANGE, 1.5, note="pulses, truth")
    ends = ((3.2, "predict", "a table"), (1.95, "convert", "a data set"), (0.7, "your code", "frames"))
    for y, name, note in ends:
        arrow(ax, (5.25, 1.95), (6.15, y))
        box(ax, 7.1, y, name, GREEN if name != "your code" else PINK, 1.6, note=note)
    save(figure, "convert.svg")


plt.style.use("iceaggr.figures")
draw_writing()
draw_convert()
