"""A step of several processes: distributed.svg.

    python nbs/images/make_distributed.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

COLOURS = ["#0072B2", "#D55E00", "#009E73"]
INK, SOFT, CARD = "#1c2430", "#5b6675", "#e8ecf1"


def box(ax, x, y, width, height, colour, words="", text="white"):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white"))
    ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", color=text, fontsize=9)


def arrow(ax, start, stop):
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=12, color=SOFT))


def draw(path):
    "From one batch over three processes to one step."
    figure, ax = plt.subplots(figsize=(9, 2.6))
    for k, owner in enumerate([0, 1, 2, 1, 0, 2, 2, 1, 0]):
        box(ax, 0.1 + 0.2 * k, 1.0, 0.2, 0.5, COLOURS[owner])
    ax.text(1.0, 1.75, "batch of a step", ha="center", fontsize=9, color=INK)
    for r, colour in enumerate(COLOURS):
        y = 2.0 - 0.95 * r
        arrow(ax, (2.0, 1.25), (2.75, y + 0.25))
        box(ax, 2.85, y, 2.5, 0.5, colour, f"process {r}: loss, gradients")
        arrow(ax, (5.45, y + 0.25), (6.2, 1.25))
    box(ax, 6.3, 0.9, 1.3, 0.7, INK, "sums")
    arrow(ax, (7.7, 1.25), (8.2, 1.25))
    box(ax, 8.3, 0.9, 1.5, 0.7, CARD, "the same step\neverywhere", INK)
    ax.set(xlim=(0, 9.9), ylim=(0, 2.6))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("distributed.svg"))
