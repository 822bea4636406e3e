"""Draw packing.svg: DOMs of three events, and the sequences that they fill."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from iceaggr.packing import pack_lengths
from iceaggr.style import BLUE, GREEN, ORANGE

LENGTH = 16
EVENTS = [[1, 7, 1, 2, 1], [20, 1, 3, 1, 1], [1, 4, 1, 1, 2]]
COLOURS = [BLUE, ORANGE, GREEN]


def box(ax, x, y, n, colour, text=""):
    "A DOM of n pulses: one box with a line between its pulses."
    ax.add_patch(plt.Rectangle((x, y), n, 0.8, facecolor=colour, edgecolor="white", linewidth=2))
    for k in range(1, n): ax.plot([x + k, x + k], [y + 0.08, y + 0.72], color="white", linewidth=0.5)
    if text: ax.text(x + n / 2, y + 0.4, text, ha="center", va="center", color="white", fontsize=8)


plt.style.use("iceaggr.figures")
figure, ax = plt.subplots(figsize=(9, 3.4))
for row, (doms, colour) in enumerate(zip(EVENTS, COLOURS, strict=True)):
    x = 0
    ax.text(-0.6, -row * 1.1 + 0.4, f"event {row}", ha="right", va="center", color=colour)
    for n in doms:
        box(ax, x, -row * 1.1, n, colour, str(n) if n > 1 else "")
        x += n + 0.5

chunks = [(min(LENGTH, n - start), colour) for doms, colour in zip(EVENTS, COLOURS, strict=True)
          for n in doms for start in range(0, n, LENGTH)]
piece, size, per_sequence = pack_lengths([n for n, _ in chunks], LENGTH)
sequence = np.repeat(np.arange(len(per_sequence)), per_sequence)
left = 30
for row in range(len(per_sequence)):
    x = left
    for p, n in zip(piece[sequence == row], size[sequence == row], strict=True):
        gap = p == len(chunks)
        if gap: box(ax, x, -row * 1.1, int(n), "#DDDDDD")
        else: box(ax, x, -row * 1.1, int(n), chunks[p][1], str(n) if n > 1 else "")
        x += n
    ax.text(left + LENGTH + 0.4, -row * 1.1 + 0.4, f"sequence {row}", va="center")
ax.text(0, 1.1, "DOMs of each event, with their number of pulses")
ax.text(left, 1.1, "packed sequences of L = 16 pulses (grey: padding)")
ax.set(xlim=(-4, left + LENGTH + 5), ylim=(-len(per_sequence) * 1.1 + 0.6, 1.8))
ax.axis("off")
figure.savefig(Path(__file__).with_name("packing.svg"), bbox_inches="tight", facecolor="white")
