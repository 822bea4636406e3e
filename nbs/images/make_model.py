"""Draw model.svg: the parts of the model and the shapes between them."""
from pathlib import Path

import matplotlib.pyplot as plt

from iceaggr.style import BLUE, GREEN, GREY, ORANGE

BOXES = [("pulses", "12 to 180,000\nper event", GREY), ("packing", "S sequences\nof L pulses", GREY),
         ("T1", "attention inside\neach DOM", BLUE),
         ("accumulator", "DOM embeddings\nof whole events", GREEN),
         ("T2", "geometry and\nattention over\nDOMs", ORANGE)]
SHAPES = ["(P, 4)", "(S, L, 4)", "(D, C)", "(D, C)", "(B, 3)"]

plt.style.use("iceaggr.figures")
figure, ax = plt.subplots(figsize=(10, 1.9))
for k, ((title, text, colour), shape) in enumerate(zip(BOXES, SHAPES, strict=True)):
    x = 2.4 * k
    ax.add_patch(plt.Rectangle((x, 0), 1.7, 1, facecolor="white", edgecolor=colour, linewidth=2))
    ax.text(x + 0.85, 0.76, title, ha="center", va="center", weight="bold", color=colour)
    ax.text(x + 0.85, 0.36, text, ha="center", va="center", fontsize=8)
    ax.annotate("", xy=(x + 2.38, 0.5), xytext=(x + 1.72, 0.5), arrowprops=dict(arrowstyle="->"))
    ax.text(x + 2.05, 0.6, shape, ha="center", va="bottom", fontsize=8)
ax.text(12.05, 0.5, "azimuth, zenith,\nkappa, r68", va="center")
ax.set(xlim=(-0.1, 13.5), ylim=(-0.1, 1.2))
ax.axis("off")
figure.savefig(Path(__file__).with_name("model.svg"), bbox_inches="tight", facecolor="white")
