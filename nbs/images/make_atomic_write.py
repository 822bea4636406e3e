"""How a file is written whole or not at all: atomic_write.svg.

    python nbs/images/make_atomic_write.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, CARD, BLUE, ORANGE = "#1c2430", "#5b6675", "#e8ecf1", "#0072B2", "#D55E00"


def box(ax, x, y, words, edge=SOFT):
    options = dict(boxstyle="round,pad=0.05", facecolor=CARD, edgecolor=edge)
    ax.add_patch(FancyBboxPatch((x, y), 2.1, 0.6, **options))
    ax.text(x + 1.05, y + 0.3, words, ha="center", va="center", fontsize=9, color=INK)


def arrow(ax, start, stop, words, colour, place):
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=colour))
    ax.text(*place, words, ha="center", va="center", fontsize=9, color=colour)


def draw(path):
    "From the temporary name to the final one, or to nothing."
    figure, ax = plt.subplots(figsize=(8, 1.9))
    box(ax, 0.1, 0.6, ".result.csv.part")
    box(ax, 5.2, 1.1, "result.csv", BLUE)
    box(ax, 5.2, 0.1, "nothing is left", ORANGE)
    arrow(ax, (2.3, 1.0), (5.1, 1.4), "whole: renamed", BLUE, (3.5, 1.45))
    arrow(ax, (2.3, 0.8), (5.1, 0.4), "an error, Ctrl-C: removed", ORANGE, (3.5, 0.3))
    ax.set(xlim=(0, 7.5), ylim=(0, 1.8))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("atomic_write.svg"))
