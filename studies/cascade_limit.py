"""Compute how well simulated cascades could be measured, and append each event to a table.

    python studies/cascade_limit.py EVENTS [--seed 0] [--geometry PATH] --hardware "1 core of ..."

Events with more than --most photo-electrons take long and are left out; the column `brighter` counts those
before each event. The script can be interrupted and called again: events of the seed that the table has from
this simulation, geometry and commit are skipped. Another seed adds other events, also at the same time.
"""
import argparse
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from iceaggr.common import atomic_write, progress_bar
from iceaggr.engine.checkpoints import source_commit
from iceaggr.simulation.dataset import VERSION, make_detector
from iceaggr.studies.limit import cascade_limit, observed_cascades


def parse_arguments():
    "Arguments of the command line."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--geometry", help="default: the surveyed IceCube-86")
    parser.add_argument("--most", type=int, default=500, help="photo-electrons")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--out", type=Path, default=Path("studies/results/cascade_limit.csv"))
    return parser.parse_args()


def read_rows(path):
    "Rows of the table so far, as text so that no digit changes; a list of one frame or none."
    return [pd.read_csv(path, dtype=str, keep_default_na=False)] if path.exists() else []


def finished_events(path, origin):
    "Events that the table has from the same seed, simulation and commit."
    finished = set()
    for table in read_rows(path):
        same = (table[list(origin)] == pd.Series(origin).astype(str)).all(axis=1)
        finished.update(int(event) for event in table.event[same])
    return finished


def limit_row(detector, cascade, event):
    "Sizes of a cascade, its limit with all DOMs, and with hit DOMs only."
    sizes = {"energy": cascade["energy"], "photo_electrons": len(cascade["sensor"]),
             "sensors": len(np.unique(cascade["sensor"])), "pulses": len(cascade["pulses"])}
    limit = cascade_limit(detector, cascade, seed=event)
    hit_only = cascade_limit(detector, cascade, seed=event, dark=False)
    return {**sizes, **limit, "expected_of_hit_doms": hit_only["expected"]}


def main(args):
    detector = make_detector(args.geometry)
    cascades = observed_cascades(np.random.default_rng(args.seed), detector, args.events)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    checksum = zlib.crc32(detector.xyz.tobytes() + detector.efficiency.tobytes())
    sensors = "" if args.geometry is None else f", sensors {checksum:08x}"
    origin = {"seed": args.seed, "simulation": f"{VERSION}{sensors}", "commit": source_commit() or ""}
    finished = finished_events(args.out, origin)
    too_bright = np.array([len(c["sensor"]) > args.most for c in cascades])
    todo = [event for event in np.flatnonzero(~too_bright) if event not in finished]
    for event in progress_bar(todo, "cascades"):
        row = {"seed": args.seed, "event": event, **limit_row(detector, cascades[event], event),
               "brighter": too_bright[:event].sum(), "simulation": origin["simulation"],
               "commit": origin["commit"], "hardware": args.hardware}
        table = pd.concat([*read_rows(args.out), pd.DataFrame([row])])  # with rows of other processes
        with atomic_write(args.out) as part: table.to_csv(part, index=False)


if __name__ == "__main__":
    main(parse_arguments())
