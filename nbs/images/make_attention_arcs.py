"""What one pulse of a train attends to: attention_arcs.png.

    python nbs/images/make_attention_arcs.py DATA EVENT_ID SENSOR_ID"""
import argparse
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch

from iceaggr.attention_maps import dom_attention
from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer
from iceaggr.style import BLUE, GREY, ORANGE, new_axes

SHOWN = 24    # pulses


def draw(path, event, sensor_id):
    "Pulses in order of time, the charge as height, arcs from the last one shown."
    maps = dom_attention(HierarchicalTransformer.from_pretrained("small"), event, sensor_id)
    charge, weights = maps.tokens.charge.to_numpy()[:SHOWN], maps.weights[0, 0, SHOWN - 1, :SHOWN].numpy()
    plt.style.use("iceaggr.figures")
    figure, ax = new_axes(width=8, height=2.8)
    pulse = np.arange(1, SHOWN + 1)
    ax.bar(pulse[:-1], np.log10(1 + 10 * charge[:-1]), 0.6, color=GREY)
    ax.bar(pulse[-1:], np.log10(1 + 10 * charge[-1:]), 0.6, color=ORANGE)
    for k, weight in zip(pulse[:-1], weights, strict=False):
        ax.add_patch(FancyArrowPatch((SHOWN, 0), (k, 0), connectionstyle="arc3,rad=-0.22", arrowstyle="-",
                                     lw=40 * weight, color=BLUE, alpha=0.75))
    ticks = [0.1, 1, 10, 50]
    ax.set(xlim=(0, SHOWN + 1), ylim=(-2.4, 3), xticks=[1, 6, 12, 18, 24])
    ax.set_xlabel("pulse of the DOM, in order of time")
    ax.set_yticks([np.log10(1 + 10 * q) for q in ticks], ticks)
    ax.set_ylabel("charge [p.e.]", y=0.75)
    ax.text(SHOWN - 0.5, -2.1, "arcs: what the orange pulse attends to", ha="right", color=BLUE)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of a data set")
    parser.add_argument("event_id", type=int)
    parser.add_argument("sensor_id", type=int)
    args = parser.parse_args()
    dataset = IceCubeDataset(args.data)
    ids = dataset.event_table().event_id
    event = dataset[int(ids.index[ids == args.event_id][0])]
    draw(Path(__file__).with_name("attention_arcs.png"), event, args.sensor_id)
