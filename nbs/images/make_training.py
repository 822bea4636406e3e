"""Draw training_step.svg and run_folder.svg: python nbs/images/make_training.py"""
from pathlib import Path

import matplotlib.pyplot as plt

from iceaggr.style import BLACK, BLUE, GREEN, GREY, ORANGE

HERE = Path(__file__).parent


def draw_box(ax, x, y, text, colour, width=1.5, height=0.62):
    "A rounded box around a point."
    ax.text(x, y, text, ha="center", va="center", color=BLACK, fontsize=10, linespacing=1.3)
    box = plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour, alpha=0.18)
    edge = plt.Rectangle((x - width / 2, y - height / 2), width, height, fill=False, edgecolor=colour, lw=1.5)
    ax.add_patch(box)
    ax.add_patch(edge)


def draw_arrow(ax, start, end, bend=0.):
    "An arrow between two points."
    style = dict(arrowstyle="-|>", color=GREY, lw=1.5, connectionstyle=f"arc3,rad={bend}")
    ax.annotate("", end, start, arrowprops=style)


def new_canvas(width, height):
    "Axes without a frame, one unit per inch, on a white ground."
    figure, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.axis("off")
    return figure, ax


def draw_training_step():
    figure, ax = new_canvas(10.2, 2.9)
    steps = ["batch\n(augmented)", "predict\n(B, 3)", "loss\n(von Mises-Fisher)", "backward\n(in slices)",
             "step\n(Muon, AdamW)"]
    places = [0.9 + 2.1 * i for i in range(len(steps))]
    for x, text in zip(places, steps, strict=True): draw_box(ax, x, 2.1, text, BLUE, 1.6)
    for x in places[:-1]: draw_arrow(ax, (x + 0.82, 2.1), (x + 1.28, 2.1))
    draw_arrow(ax, (places[-1], 2.43), (places[0], 2.43), 0.06)
    ax.text(5.1, 2.8, "zero_grad, next batch", ha="center", va="center", color=GREY, fontsize=9)
    draw_box(ax, places[4], 0.7, "moving average\nof the weights", GREEN, 1.7)
    draw_box(ax, places[2], 0.7, "validate: held-out and\nvalidation events", ORANGE, 2.1)
    draw_box(ax, places[0], 0.7, "checkpoint,\nbest weights, log", ORANGE, 1.7)
    draw_arrow(ax, (places[4], 1.78), (places[4], 1.02))
    draw_arrow(ax, (places[4] - 0.87, 0.7), (places[2] + 1.07, 0.7))
    draw_arrow(ax, (places[2] - 1.07, 0.7), (places[0] + 0.87, 0.7))
    ax.text((places[2] + places[4]) / 2, 0.86, "end of an epoch", ha="center", color=GREY, fontsize=9)
    figure.savefig(HERE / "training_step.svg", facecolor="white")


def draw_run_folder():
    figure, ax = new_canvas(10.2, 3.6)
    draw_box(ax, 1.4, 2.1, "training", BLUE, 1.5)
    files = [
        ("state.pt", "all that a resume needs", GREEN),
        ("best.safetensors", "lowest held-out error", ORANGE),
        ("last.safetensors", "averaged weights, newest", ORANGE),
        ("log.csv", "one row per epoch", ORANGE),
    ]
    for i, (name, meaning, colour) in enumerate(files):
        y = 3.2 - 0.75 * i
        draw_box(ax, 5, y, f"{name}\n{meaning}", colour, 2.4)
        draw_arrow(ax, (2.2, 2.1), (3.75, y))
    draw_box(ax, 8.8, 3.2, "state.previous.pt\nthe checkpoint before", GREEN, 2.2)
    draw_arrow(ax, (6.25, 3.2), (7.65, 3.2))
    ax.text(6.95, 3.3, "renamed", ha="center", color=GREY, fontsize=9)
    draw_box(ax, 1.4, 0.95, "settings.json\nwritten once, locked", GREEN, 2.)
    draw_arrow(ax, (1.4, 1.78), (1.4, 1.28))
    ax.text(8.8, 1.7, "copies of what\nstate.pt holds", ha="center", va="center", color=ORANGE, fontsize=10)
    figure.savefig(HERE / "run_folder.svg", facecolor="white")


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"               # the same file each time
    draw_training_step()
    draw_run_folder()
