"""A file that is written whole or not at all: atomic_write.svg.

    python nbs/images/make_atomic_write.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, CARD, BLUE, RED = "#1c2430", "#5b6675", "#e8ecf1", "#0072B2", "#D55E00"


def box(ax, x, y, words, edge=SOFT):
    shape = FancyBboxPatch((x, y), 2.2, 0.5, boxstyle="round,pad=0.03", facecolor=CARD, edgecolor=edge)
    ax.add_patch(shape)
    ax.text(x + 1.1, y + 0.25, words, ha="center", va="center", fontsize=9, color=INK)


def arrow(ax, start, stop, words, colour):
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=colour))
    x, y = (start[0] + stop[0]) / 2, (start[1] + stop[1]) / 2
    ax.text(x, y + 0.12, words, ha="center", va="bottom", fontsize=9, color=colour)


def draw(path):
    figure, ax = plt.subplots(figsize=(8, 1.7))
    box(ax, 0, 0.5, ".table.csv.part4711")
    box(ax, 5.6, 1, "table.csv: new", BLUE)
    box(ax, 5.6, 0, "table.csv: as before", RED)
    arrow(ax, (2.35, 0.85), (5.45, 1.25), "all went well: rename", BLUE)
    arrow(ax, (2.35, 0.65), (5.45, 0.25), "", RED)
    ax.text(3.9, 0.05, "an error: remove", ha="center", fontsize=9, color=RED)
    ax.text(1.1, 1.2, "write here", ha="center", fontsize=9, color=SOFT)
    ax.set(xlim=(-0.2, 8), ylim=(-0.2, 1.7))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("atomic_write.svg"))
