"""The three tables of a prepared batch file: prepared.svg.

    python nbs/images/make_prepared.py"""
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Polygon, Rectangle

EVENTS = ["#0072B2", "#D55E00"]
SHADES = [["#0072B2", "#4c9ccb", "#99c7e0"], ["#D55E00", "#e68e4c"]]     # one shade per DOM
PULSES = [[3, 1, 2], [4, 1]]                                              # of each DOM of each event
INK, CELL = "#1c2430", 0.42


def row(ax, y, x, width, colour):
    ax.add_patch(Rectangle((x, y), width, CELL, facecolor=colour, edgecolor="white"))


def fan(ax, left, right, colour):
    "From a row of one table to its rows in the next."
    (x0, top0, bottom0), (x1, top1, bottom1) = left, right
    corners = [(x0, top0), (x1, top1), (x1, bottom1), (x0, bottom0)]
    ax.add_patch(Polygon(corners, color=colour, alpha=0.15, linewidth=0))


def draw(path):
    "Events, DOMs and pulses, from left to right."
    figure, ax = plt.subplots(figsize=(8, 4))
    n_pulses, n_doms = sum(map(sum, PULSES)), sum(map(len, PULSES))
    height = CELL * n_pulses
    dom_y, event_y, pulse_y = height / 2 + CELL * n_doms / 2, height / 2 + CELL, height
    for event, doms in enumerate(PULSES):
        event_y -= CELL
        row(ax, event_y, 0, 1.6, EVENTS[event])
        fan(ax, (1.6, event_y + CELL, event_y), (2.8, dom_y, dom_y - CELL * len(doms)), EVENTS[event])
        for dom, pulses in enumerate(doms):
            dom_y -= CELL
            row(ax, dom_y, 2.8, 1.6, SHADES[event][dom])
            fan(ax, (4.4, dom_y + CELL, dom_y), (5.6, pulse_y, pulse_y - CELL * pulses), EVENTS[event])
            for _ in range(pulses):
                pulse_y -= CELL
                row(ax, pulse_y, 5.6, 1.6, SHADES[event][dom])
    heads = ["events\nfirst_pulse, first_dom", "DOMs\nsensor_id, first_pulse", "pulses\ntime, charge"]
    for x, words in zip((0.8, 3.6, 6.4), heads, strict=True):
        ax.text(x, height + 0.5, words, ha="center", va="center", fontsize=9, color=INK)
    ax.set(xlim=(-0.7, 7.6), ylim=(-0.1, height + 0.9))
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    plt.rcParams["svg.hashsalt"] = "iceaggr"
    draw(Path(__file__).with_name("prepared.svg"))
