"""How the widgets of the browser choose what is drawn: browser.svg.

    python nbs/images/make_browser.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from iceaggr.style import BLUE, GREEN, GREY, ORANGE

STEPS = [("file", "a table of\nits events", GREY),
         ("type, pulses,\nerror, order", "the events\nthat pass", BLUE),
         ("event, event id,\n◀ ▶", "one event\nin 3-D", ORANGE),
         ("time slider,\nclick on a ball", "light until then,\na DOM's pulses", GREEN)]


def box(ax, x, y, words, colour, filled):
    ax.add_patch(FancyBboxPatch((x, y), 1.5, 0.62, boxstyle="round,pad=0.04", edgecolor=colour,
                                facecolor=colour if filled else "white", lw=1.4))
    ink = "white" if filled else "black"
    ax.text(x + 0.75, y + 0.31, words, ha="center", va="center", fontsize=9, color=ink)


def arrow(ax, start, end):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#5b6675"))


def draw(path):
    "Widgets above, what follows from them below."
    figure, ax = plt.subplots(figsize=(9, 2.5))
    for k, (widgets, result, colour) in enumerate(STEPS):
        x = 0.1 + 2.2 * k
        box(ax, x, 1.3, widgets, colour, False)
        box(ax, x, 0.1, result, colour, True)
        arrow(ax, (x + 0.75, 1.24), (x + 0.75, 0.8))
        if k: arrow(ax, (x - 0.63, 0.41), (x - 0.06, 0.41))
    ax.text(0, 2.1, "widgets", fontsize=9, color="#5b6675")
    ax.text(0, -0.15, "what follows from them", fontsize=9, color="#5b6675")
    ax.set(xlim=(-0.05, 8.5), ylim=(-0.25, 2.25))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("browser.svg"))
