"""How a data set becomes batches: loading.svg.

    python nbs/images/make_loading.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

BLUE, ORANGE, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
FILES = {"3": BLUE, "1": ORANGE, "4": GREEN, "2": PINK}      # in shuffled order, two per window
PACE = [0, 3, 1, 2, 5, 4, 7, 6]                              # an order of eight events


def box(ax, x, y, width, height, colour, words="", text="white"):
    ax.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white"))
    ax.text(x + width / 2, y + height / 2, words, ha="center", va="center", color=text, fontsize=9)


def arrow(ax, x, y, dx):
    ax.add_patch(FancyArrowPatch((x, y), (x + dx, y), arrowstyle="-|>", mutation_scale=12, color="#5b6675"))


def draw(path):
    "Files, windows, lists, worker processes, training, from left to right."
    figure, ax = plt.subplots(figsize=(9, 3))
    for window in range(2):
        colours = list(FILES.values())[2 * window:2 * window + 2]
        y = 1.75 - 1.5 * window
        for k, (name, colour) in enumerate(list(FILES.items())[2 * window:2 * window + 2]):
            box(ax, 0.1, y + 0.45 - 0.5 * k, 1.1, 0.42, colour, f"file {name}")
        arrow(ax, 1.35, y + 0.4, 0.5)
        for k, place in enumerate(PACE):
            box(ax, 2.0 + 0.22 * k, y + 0.2, 0.22, 0.42, colours[place % 2])
        arrow(ax, 3.9, y + 0.4, 0.5)
        for k in range(2):
            box(ax, 4.55 + 0.7 * k, y + 0.2, 0.6, 0.42, "#d8dee6", f"list {2 * window + k + 1}", "#1c2430")
        arrow(ax, 6.0, y + 0.4, 0.5)
        box(ax, 6.65, y + 0.1, 1.1, 0.62, "#5b6675", f"worker {window + 1}\npacks")
        arrow(ax, 7.85, y + 0.4 - 0.12 * (1 - 2 * window), 0.5)
    box(ax, 8.5, 0.3, 1.1, 2.2, "#1c2430", "training:\npacked\nbatches")
    heads = {0.65: "files, shuffled", 2.9: "events of a window,\nshuffled", 5.2: "lists", 7.2: "processes"}
    for x, words in heads.items():
        ax.text(x, 2.95, words, ha="center", va="center", fontsize=9, color="#1c2430")
    ax.text(0.1, -0.3, "one colour per file; two files are open at a time", fontsize=9, color="#5b6675")
    ax.set(xlim=(0, 9.7), ylim=(-0.45, 3.2))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("loading.svg"))
