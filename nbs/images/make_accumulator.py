"""Draw accumulator.svg: parts of a batch, the events held after each, and the events handed out."""
from pathlib import Path

import matplotlib.pyplot as plt

from iceaggr.style import BLUE, GREEN, ORANGE

COLOURS = {7: BLUE, 9: ORANGE, 4: GREEN}
TOTALS = {7: 2, 9: 5, 4: 3}
PARTS = [[7, 7, 9], [9, 9, 9], [9, 4]]


def boxes(ax, x, y, events, expected=False):
    "One box per DOM; empty boxes for those that are still to come."
    for k, event in enumerate(events):
        colour = COLOURS[event]
        ax.add_patch(plt.Rectangle((x + 0.55 * k, y), 0.5, 0.5, facecolor=colour, edgecolor=colour))
    if not expected: return
    for k in range(len(events), TOTALS[events[0]]):
        ax.add_patch(plt.Rectangle((x + 0.55 * k, y), 0.5, 0.5, facecolor="white", edgecolor=colour))


plt.style.use("iceaggr.figures")
figure, ax = plt.subplots(figsize=(9, 3))
held = {}
for row, part in enumerate(PARTS):
    y = -1.7 * row
    ax.text(0, y + 0.25, f"part {row}", va="center")
    boxes(ax, 1.2, y, part)
    for event in part: held[event] = held.get(event, 0) + 1
    for line, (event, n) in enumerate(held.items()):
        boxes(ax, 5.2, y - 0.65 * line, [event] * n, expected=True)
        ax.text(5.1, y - 0.65 * line + 0.25, f"event {event} ", ha="right", va="center", color=COLOURS[event])
        if n < TOTALS[event]: continue
        ax.annotate("", xy=(9.6, y - 0.65 * line + 0.25), xytext=(8.2, y - 0.65 * line + 0.25),
                    arrowprops=dict(arrowstyle="->"))
        ax.text(9.7, y - 0.65 * line + 0.25, f"T2 (event {event})", va="center", color=COLOURS[event])
    held = {event: n for event, n in held.items() if n < TOTALS[event]}
for x, title in ((1.2, "DOM embeddings from T1"), (5.2, "held"), (9.7, "handed out")): ax.text(x, 0.9, title)
ax.set(xlim=(-0.2, 11.6), ylim=(-4.4, 1.3))
ax.axis("off")
figure.savefig(Path(__file__).with_name("accumulator.svg"), bbox_inches="tight", facecolor="white")
