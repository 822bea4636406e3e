"""The verbs of the command and the files between them: command.svg.

    python nbs/images/make_command.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, SOFT, FILE, VERB = "#1c2430", "#5b6675", "#e8ecf1", "#0072B2"
WIDTH, HEIGHT = 1.7, 0.7      # of a box
FILES = ["data set", "prepared\ndata", "RUN\nweights, log", "predictions\n.csv .parquet", "report.html"]
VERBS = ["prepare", "train", "predict", "evaluate"]      # each leads to the next file
STEP = 3.1                                               # from one file to the next


def box(ax, words, x, y):
    shape = FancyBboxPatch((x, y), WIDTH, HEIGHT, boxstyle="round,pad=0.03", facecolor=FILE, edgecolor=SOFT)
    ax.add_patch(shape)
    ax.text(x + WIDTH / 2, y + HEIGHT / 2, words, ha="center", va="center", fontsize=9, color=INK)


def arrow(ax, start, stop, verb, place):
    ax.add_patch(FancyArrowPatch(start, stop, arrowstyle="-|>", mutation_scale=13, color=VERB))
    ax.text(*place, verb, ha="center", va="bottom", fontsize=9, color=VERB, weight="bold")


def draw(path):
    "Files as boxes, verbs as arrows."
    figure, ax = plt.subplots(figsize=(10, 2.2))
    middle = HEIGHT / 2
    for k, words in enumerate(FILES): box(ax, words, STEP * k, 0)
    for k, verb in enumerate(VERBS):
        start, stop = STEP * k + WIDTH + 0.05, STEP * (k + 1) - 0.05
        arrow(ax, (start, middle), (stop, middle), verb, ((start + stop) / 2 - 0.03, middle + 0.06))
    arrow(ax, (-1.35, middle), (-0.05, middle), "simulate", (-0.74, middle + 0.06))
    box(ax, "event.html\n.pdf .png", 4 * STEP, -1.15)
    arrow(ax, (3 * STEP + WIDTH + 0.05, 0.1), (4 * STEP - 0.05, -0.75), "display", (3.8 * STEP - 0.6, -0.75))
    notes = "Kaggle's data need no simulation.\nPreparing is optional: train and predict take either form."
    ax.text(0, -0.75, notes, va="center", fontsize=9, color=SOFT)
    ax.set(xlim=(-1.45, 4 * STEP + WIDTH + 0.1), ylim=(-1.25, 0.85))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("command.svg"))
