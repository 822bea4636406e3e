"""A muon track as the displays show it: display.png.

    python nbs/images/make_display.py DATA EVENT_ID"""
import argparse
from pathlib import Path

import matplotlib
import torch

matplotlib.use("agg")
from iceaggr.data import IceCubeDataset
from iceaggr.direction import vector_to_angles
from iceaggr.display import plot_event
from iceaggr.line_fit import line_fit


def draw(path, dataset, event_id):
    "The event with its line fit and a cone."
    ids = dataset.event_table().event_id
    event = dataset[int(ids.index[ids == event_id][0])]
    direction = line_fit(event["pulse_features"], dataset.geometry.xyz)
    azimuth, zenith = (float(a[0]) for a in vector_to_angles(torch.from_numpy(direction)))
    figure = plot_event(event, dataset.geometry, prediction={"line fit": (azimuth, zenith, 30.)}, title="")
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder of a data set")
    parser.add_argument("event_id", type=int)
    args = parser.parse_args()
    draw(Path(__file__).with_name("display.png"), IceCubeDataset(args.data), args.event_id)
