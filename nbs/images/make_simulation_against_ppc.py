"""Draw the picture that opens the comparison of the simulation with PPC events.

    ICEAGGR_PPC=FOLDER python nbs/images/make_simulation_against_ppc.py
"""
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from iceaggr.geometry import load_geometry
from iceaggr.simulation import simulate_dataset
from iceaggr.studies.comparison import hit_probability, read_with_truth, track_residuals
from iceaggr.style import BLUE, ORANGE, new_axes

EDGES = np.r_[0, 10, 15:160:10]


def read_both(folder):
    "Pulses and truth of simulated and of PPC events."
    root = os.environ["ICEAGGR_PPC"]
    ppc, geometry = read_with_truth(root), load_geometry(root)
    dead = np.setdiff1d(np.arange(len(geometry)), ppc[0].sensor_id)
    made = simulate_dataset(Path(folder) / "made", 16_000, seed=11, mix="ppc", geometry=geometry,
                            dead_doms=dead, progress=False)
    return {"simulated": read_with_truth(made), "PPC": ppc}, geometry


def draw(axes, pulses, truth, geometry, **style):
    "One line per panel."
    sizes = np.log10(pulses.groupby("event").size())
    axes[0].hist(sizes, np.arange(1, 5, 0.1), density=True, histtype="step", **style)
    residuals = track_residuals(pulses, truth, geometry)
    share = hit_probability(residuals, truth, geometry, EDGES)
    axes[1].plot((EDGES[1:] + EDGES[:-1]) / 2, share, marker=".", **style)
    near = residuals[residuals.hlc & residuals.distance.between(35, 45)].sort_values("residual")
    first = near.drop_duplicates(["event", "sensor_id"]).residual
    axes[2].hist(first, np.arange(-50, 400, 10), density=True, histtype="step", **style)


if __name__ == "__main__":
    plt.style.use("iceaggr.figures")
    plt.rcParams["svg.hashsalt"] = "simulation_against_ppc"
    with tempfile.TemporaryDirectory() as folder: sets, geometry = read_both(folder)
    figure, axes = new_axes(3, 9, 2.8)
    for (label, tables), colour, line in zip(sets.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
        draw(axes, *tables, geometry, color=colour, ls=line, label=label)
    axes[0].set(xlabel="log10 pulses per event", ylabel="density")
    axes[1].set(xlabel="distance from a muon [m]", ylabel="share of DOMs hit", yscale="log")
    axes[2].set(xlabel="delay of first pulses at 40 m [ns]", ylabel="density [1/ns]")
    axes[0].legend()
    path = Path(__file__).parent / "simulation_against_ppc.svg"
    figure.savefig(path, metadata={"Date": None})
