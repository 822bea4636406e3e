"""Draw frames.svg: a table of pulses, and the events that it holds."""
from pathlib import Path

import matplotlib.pyplot as plt

from iceaggr.style import BLUE, ORANGE

ROWS = [(4, 17, 12, 1.0), (9, 803, 5, 2.0), (4, 17, 10, 0.5), (9, 12, 7, 1.5), (4, 2041, 11, 0.8)]
COLOURS = {4: BLUE, 9: ORANGE}
NAMES = ("event_id", "sensor_id", "time [ns]", "charge [p.e.]")


def table(ax, x, y, rows, names):
    "A small table with one colour per event."
    for k, name in enumerate(names): ax.text(x + 1.5 * k, y, name, ha="center", fontsize=9, weight="bold")
    for line, row in enumerate(rows, 1):
        values = row[-len(names):]
        for k, value in enumerate(values):
            ax.text(x + 1.5 * k, y - 0.6 * line, value, ha="center", fontsize=9, color=COLOURS[row[0]])


plt.style.use("iceaggr.figures")
figure, ax = plt.subplots(figsize=(9, 2.6))
table(ax, 0, 0, ROWS, NAMES)
ax.annotate("", xy=(7, -1.5), xytext=(5.6, -1.5), arrowprops=dict(arrowstyle="->"))
y = 0.
for event, colour in COLOURS.items():
    rows = sorted((row for row in ROWS if row[0] == event), key=lambda row: row[2])
    ax.text(7.3, y, f"event {event}", color=colour, weight="bold", fontsize=9)
    table(ax, 9.5, y, rows, NAMES[1:])
    y -= 0.6 * len(rows) + 0.9
ax.set(xlim=(-0.9, 13.5), ylim=(-4.4, 0.5))
ax.axis("off")
figure.savefig(Path(__file__).with_name("frames.svg"), bbox_inches="tight", facecolor="white")
