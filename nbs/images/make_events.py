"""Events in files: batch_file.svg (where their pulses lie), bad_events.svg (what can be wrong with them),
graphnet.svg (from GraphNeT's tables to the Kaggle layout).

    python nbs/images/make_events.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

INK, SOFT, CARD, RED = "#1c2430", "#5b6675", "#e8ecf1", "#D55E00"
COLOURS = ["#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]      # one per event
SMALL = 8.5


def box(ax, x, y, width, height, colour, words="", ink="white"):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", lw=0.8))
    ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", color=ink, fontsize=SMALL)


def arrow(ax, start, stop, colour=SOFT):
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=11, color=colour))


def finish(ax, path, xlim, ylim):
    ax.set(xlim=xlim, ylim=ylim)
    ax.axis("off")
    ax.figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(ax.figure)


def batch_file(path):
    "Rows of the meta table, each with its range of rows in the batch file."
    figure, ax = plt.subplots(figsize=(9, 2.5))
    rows = [("24", "0", "6"), ("41", "7", "10"), ("59", "11", "15")]
    for k, name in enumerate(("event_id", "first", "last", "azimuth, zenith")):
        ax.text(0.5 + 1.0 * k + 0.15 * (k == 3), 2.05, name, ha="center", fontsize=SMALL, color=INK)
    for k, ((event, first, last), colour) in enumerate(zip(rows, COLOURS, strict=False)):
        y = 1.5 - 0.5 * k
        box(ax, 0, y, 1, 0.42, colour, event)
        for j, words in enumerate((first, last)): box(ax, 1 + j, y, 1, 0.42, CARD, words, INK)
        box(ax, 3, y, 1.3, 0.42, CARD, "target", INK)
        middle = (int(first) + int(last) + 1) / 2
        arrow(ax, (4.4, y + 0.2), (5.2 + 0.25 * middle, 0.05))
        for i in range(int(first), int(last) + 1): box(ax, 5.2 + 0.25 * i, -0.45, 0.25, 0.42, colour)
    for i in (0, 6, 7, 10, 11, 15):
        ax.text(5.325 + 0.25 * i, -0.68, str(i), ha="center", fontsize=7, color=SOFT)
    ax.text(0, 2.45, "train_meta.parquet: one row per event", weight="bold", fontsize=9.5, color=INK)
    ax.text(5.2, -1.05, "train/batch_1.parquet: one row per pulse", weight="bold", fontsize=9.5, color=INK)
    ax.text(5.2, -1.4, "event_id, sensor_id, time, charge, auxiliary", fontsize=SMALL, color=SOFT)
    finish(ax, path, (-0.1, 9.4), (-1.5, 2.7))


WORDS = ["good", "charge -1\nin one row", "ends a row\ntoo early", "good", "begins in\nanother event"]


def bad_events(path):
    "Ranges of the meta table above the rows of the batch file; three of five events are bad."
    figure, ax = plt.subplots(figsize=(9, 2.1))
    sizes, start = [6, 5, 7, 6, 6], 0
    ranges = [(0, 5), (6, 10), (11, 16), (18, 23), (23, 29)]      # the third is short, the fifth overlaps
    for k, (size, (first, last)) in enumerate(zip(sizes, ranges, strict=True)):
        for i in range(start, start + size): box(ax, 0.3 * i, 0, 0.3, 0.4, COLOURS[k])
        colour = RED if k in (1, 2, 4) else INK
        y = 0.75 if k < 4 else 0.95
        ax.plot([0.3 * first + 0.05, 0.3 * last + 0.25], [y, y], color=colour, lw=3, solid_capstyle="butt")
        middle = 0.15 * (first + last + 1)
        ax.text(middle, y + 0.15, WORDS[k], ha="center", va="bottom", fontsize=SMALL, color=colour)
        start += size
    ax.plot(0.3 * 8.5, 0.2, "x", color="white", ms=8, mew=2)
    ax.text(-0.2, 0.75, "range in the meta table", ha="right", va="center", fontsize=SMALL, color=SOFT)
    ax.text(-0.2, 0.2, "rows of the batch file,\ncoloured by event_id", ha="right", va="center",
            fontsize=SMALL, color=SOFT)
    finish(ax, path, (-2.4, 9.2), (-0.1, 1.7))


def table(ax, x, y, title, rows, colour):
    "A table with its columns as lines of text."
    ax.add_patch(Rectangle((x, y - 0.3 * len(rows) - 0.1), 2.6, 0.3 * len(rows) + 0.1, facecolor=CARD))
    box(ax, x, y, 2.6, 0.38, colour, title)
    for k, words in enumerate(rows): ax.text(x + 0.12, y - 0.25 - 0.3 * k, words, fontsize=SMALL, color=INK)


def graphnet(path):
    "Two tables of GraphNeT, joined by event_no, and what becomes of their columns."
    figure, ax = plt.subplots(figsize=(9, 2.9))
    pulses = ["event_no", "dom_x, dom_y, dom_z [m]", "dom_time [ns]", "charge [p.e.]", "hlc"]
    converted = ["event_id", "sensor_id", "time [ns]", "charge [p.e.]", "auxiliary"]
    table(ax, 0, 2, "SplitInIcePulses", pulses, COLOURS[0])
    table(ax, 6.4, 2, "train/batch_1.parquet", converted, COLOURS[0])
    notes = ["", "sensor at that position", "rounded to whole ns", "", "no local coincidence"]
    for k, words in enumerate(notes):
        arrow(ax, (2.7, 1.8 - 0.3 * k), (6.3, 1.8 - 0.3 * k))
        ax.text(4.5, 1.83 - 0.3 * k, words, ha="center", va="bottom", fontsize=7.5, color=SOFT)
    table(ax, 0, -0.1, "truth", ["event_no", "azimuth, zenith [rad]"], COLOURS[1])
    rows = ["event_id, rows of its pulses", "azimuth, zenith [rad]"]
    table(ax, 6.4, -0.1, "train_meta.parquet", rows, COLOURS[1])
    for k in range(2): arrow(ax, (2.7, -0.3 - 0.3 * k), (6.3, -0.3 - 0.3 * k))
    finish(ax, path, (-0.1, 9.1), (-0.85, 2.5))


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    for draw in (batch_file, bad_events, graphnet):
        draw(Path(__file__).with_name(f"{draw.__name__}.svg"))
