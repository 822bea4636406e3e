"""Draw pulses.svg: pulses in order of time, and by (event, DOM, time)."""
from pathlib import Path

import matplotlib.pyplot as plt

from iceaggr.style import AMBER, BLUE, GREEN, ORANGE, PINK

COLOURS = {17: BLUE, 803: ORANGE, 2041: GREEN, 18: PINK, 5: AMBER}
EVENTS = [[803, 2041, 17, 803, 2041, 803], [17, 18, 5, 18]]

plt.style.use("iceaggr.figures")
figure, ax = plt.subplots(figsize=(9, 2.4))
x = 0
for number, sensors in enumerate(EVENTS):
    by_dom = sorted(range(len(sensors)), key=lambda i, sensors=sensors: sensors[i])
    ax.text(x, 2.75, f"event {number}")
    for place, rank in enumerate(by_dom):
        for y, k, at in ((1.8, rank, rank), (0, rank, place)):
            colour = COLOURS[sensors[k]]
            ax.add_patch(plt.Rectangle((x + at, y), 0.92, 0.8, facecolor=colour))
            ax.text(x + at + 0.46, y + 0.4, sensors[k], color="white", ha="center", va="center", fontsize=8)
        ax.text(x + place + 0.46, -0.35, rank, ha="center", va="center", fontsize=8)
        ax.plot([x + rank + 0.46, x + place + 0.46], [1.75, 0.85], color=COLOURS[sensors[rank]], lw=1)
    x += len(sensors) + 1
for y, text in ((2.2, "by time"), (0.4, "by DOM"), (-0.35, "rank")):
    ax.text(-0.3, y, text, ha="right", va="center")
ax.set(xlim=(-1.6, x), ylim=(-0.7, 3.1))
ax.axis("off")
figure.savefig(Path(__file__).with_name("pulses.svg"), bbox_inches="tight", facecolor="white")
