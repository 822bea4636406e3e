"""Work out how well simulated cascades could be measured, and append each event to studies/results/cascade_limit.csv.

    python studies/cascade_limit.py EVENTS [--seed 0] [--geometry PATH] --hardware "1 core of ..."

Events with more than --most photo-electrons are left out of the table: they take long, and are counted in its column `brighter` (so many before this one). It can be interrupted and called again: events of the seed that the table has from this simulation, geometry and commit are not worked out twice. Another seed adds other events, also at the same time."""
import argparse
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from iceaggr.studies.limit import cascade_limit, observed_cascades
from iceaggr.common import atomic_write
from iceaggr.simulation.dataset import VERSION, make_detector
from iceaggr.engine.checkpoints import source_commit

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--geometry", help="default: the nominal detector")
    parser.add_argument("--most", type=int, default=500, help="photo-electrons")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--out", type=Path, default=Path("studies/results/cascade_limit.csv"))
    args = parser.parse_args()

    detector = make_detector(args.geometry)
    cascades = observed_cascades(np.random.default_rng(args.seed), detector, args.events)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sensors = "" if args.geometry is None else f", sensors {zlib.crc32(detector.xyz.tobytes() + detector.efficiency.tobytes()):08x}"
    same = dict(seed=args.seed, simulation=f"{VERSION}{sensors}", commit=source_commit() or "")
    table = lambda: [pd.read_csv(args.out, dtype=str, keep_default_na=False)] if args.out.exists() else []        # as text: no digit changes
    done = {int(k) for t in table() for k in t.event[(t[list(same)] == pd.Series(same).astype(str)).all(axis=1)]}
    few = [len(c["sensor"]) <= args.most for c in cascades]
    for k in tqdm([k for k in np.flatnonzero(few) if k not in done], "cascades"):
        c = cascades[k]
        row = dict(seed=args.seed, event=k, energy=c["energy"], photo_electrons=len(c["sensor"]), sensors=len(np.unique(c["sensor"])), pulses=len(c["pulses"]), **cascade_limit(detector, c, seed=k), expected_of_hit_doms=cascade_limit(detector, c, seed=k, dark=False)["expected"],
                   brighter=few[:k].count(False), simulation=same["simulation"], commit=same["commit"], hardware=args.hardware)
        with atomic_write(args.out) as part: pd.concat([*table(), pd.DataFrame([row])]).to_csv(part, index=False)          # with what others have added meanwhile
