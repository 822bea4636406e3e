"""The detector from above, from the side, and its ice: detector.png.

    python nbs/images/make_detector.py"""
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from iceaggr.geometry import load_geometry, plot_ice, plot_side_view, plot_top_view


def draw(path):
    "Three panels from left to right."
    plt.style.use("iceaggr.figures")
    detector = load_geometry("small")
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 4.2), width_ratios=[1, 1.05, 0.7])
    plot_top_view(detector, axes[0], labels=False)
    plot_side_view(detector, axes[1])
    plot_ice(axes[2])
    axes[0].set_title("from above: 86 strings")
    axes[1].set_title("from the south: 5,160 DOMs")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(__file__).with_name("detector.png"))
