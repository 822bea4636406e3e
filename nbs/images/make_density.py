"""Draw one cone, and a density that says more.

    python nbs/images/make_density.py
"""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from iceaggr.density import SphereMixture
from iceaggr.direction import angles_to_vector
from iceaggr.style import ORANGE, new_axes

AZIMUTH, ZENITH = np.arange(0, 221, 1.0), np.arange(1, 180, 1.0)


def mixture(weights, azimuths, zeniths, kappas):
    "A density of components [degrees]."
    means = angles_to_vector(np.radians(azimuths), np.radians(zeniths))
    return SphereMixture(torch.tensor([weights]).log(), means[None], torch.tensor([kappas]))


def draw(ax, density, title):
    "Density and the border of the region that holds 90 %."
    directions = angles_to_vector(np.radians(AZIMUTH), np.radians(ZENITH)[:, None])
    values = density.log_density(directions.reshape(1, -1, 3)).reshape(directions.shape[:2]).numpy()
    ranked, weights = density.ranked(256)
    border = float(ranked[0, int((weights.cumsum(-1) < 0.9).sum())])
    ax.pcolormesh(AZIMUTH, ZENITH, np.maximum(values, -8), cmap="Blues", rasterized=True)
    ax.contour(AZIMUTH, ZENITH, values, [border], colors=ORANGE)
    ax.set(title=title, xlim=(0, 220), ylim=(180, 0))


if __name__ == "__main__":
    plt.style.use("iceaggr.figures")
    plt.rcParams["svg.hashsalt"] = "density"
    figure, axes = new_axes(2, 9, 2.8, xlabel="azimuth [degrees]", ylabel="zenith [degrees]")
    draw(axes[0], mixture([1.0], [75.0], [75.0], [4.0]), "one cone")
    sharp_and_wide = [0.5, 0.2, 0.3], [57.0, 75.0, 143.0], [80.0, 75.0, 57.0], [200.0, 20.0, 8.0]
    draw(axes[1], mixture(*sharp_and_wide), "a density")
    figure.savefig(Path(__file__).parent / "density.svg", metadata={"Date": None})
