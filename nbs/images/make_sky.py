"""Draw sky.svg: IceCube's axes and the meridians, seen from above the South Pole."""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from iceaggr.geometry import Geometry
from iceaggr.sky import LONGITUDE
from iceaggr.style import BLUE, GREEN, GREY, ORANGE

plt.style.use("iceaggr.figures")
figure, ax = plt.subplots(figsize=(5, 5))
ax.plot(*Geometry.icecube86().string_xy.T, ".", color=GREY, ms=3)
for longitude in range(0, 360, 30):     # meridians run clockwise, seen from above
    angle = np.pi / 2 - np.radians(longitude)
    ax.plot([0, 900 * np.cos(angle)], [0, 900 * np.sin(angle)], color=GREY, lw=0.4)
    name = f"{longitude}°E" if longitude <= 180 else f"{360 - longitude}°W"
    ax.text(970 * np.cos(angle), 970 * np.sin(angle), name, fontsize=7, color=GREY, ha="center", va="center")
site = np.pi / 2 - np.radians(LONGITUDE)
arrows = ((0, ORANGE, "x, grid east", (600, -60)), (np.pi / 2, ORANGE, "y, grid north", (220, 700)),
          (site, BLUE, "north of the site", (-800, 260)))
for angle, colour, name, place in arrows:
    tip = 780 * np.cos(angle), 780 * np.sin(angle)
    ax.annotate("", xy=tip, xytext=(0, 0), arrowprops=dict(arrowstyle="->", color=colour, lw=1.6))
    ax.text(*place, name, color=colour, fontsize=8, ha="center")
turn = np.linspace(0, np.radians(50))
ax.plot(330 * np.cos(turn), 330 * np.sin(turn), color=GREEN)
ax.text(370 * np.cos(turn[25]), 370 * np.sin(turn[25]), "azimuth", color=GREEN, fontsize=8)
ax.set(aspect="equal", xlim=(-1050, 1050), ylim=(-1050, 1050))
ax.axis("off")
figure.savefig(Path(__file__).with_name("sky.svg"), bbox_inches="tight", facecolor="white")
