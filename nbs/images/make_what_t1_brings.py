"""Draw what the parts of T1 bring, by the brightness of events.

    python nbs/images/make_what_t1_brings.py
"""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from iceaggr.style import PALETTE, new_axes

METHODS = ["hierarchy", "pooling", "mean", "first-8", "flat"]


def gains(kind):
    "Degrees by which each method is better than three numbers per DOM: (bin, seed) rows, methods as columns."
    results = pd.read_csv(Path(__file__).parents[2] / "studies/results/what_t1_brings.csv")
    rows = results[(results.data == "simulated") & (results.kind == kind)]
    error = rows.pivot_table(index=["low", "seed"], columns="method", values="mean")
    return error[METHODS].rsub(error.summary, axis=0)


if __name__ == "__main__":
    plt.style.use("iceaggr.figures")
    plt.rcParams["svg.hashsalt"] = "what_t1_brings"
    figure, axes = new_axes(2, 9, 3.2, xlabel="pulses per event, at least")
    for ax, kind in zip(axes, ("track", "cascade"), strict=True):
        table = gains(kind)
        middle, spread = table.groupby("low").mean(), table.groupby("low").std()
        for k, (method, colour) in enumerate(zip(METHODS, PALETTE, strict=False)):
            x = np.arange(len(middle)) + 0.1 * (k - 2)
            ax.errorbar(x, middle[method], spread[method], marker="o", ms=4, lw=1, color=colour, label=method)
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xticks(range(len(middle)), [f"{low:,}" for low in middle.index])
        ax.set(title=f"{kind}s", ylabel="gain in mean error [degrees]")
    axes[0].legend(fontsize=8, loc="lower left")
    figure.savefig(Path(__file__).parent / "what_t1_brings.svg", metadata={"Date": None})
