"""Work out how well simulated cascades could be measured, beside what a pretrained model makes of their pulses, and append each event to benchmarks/results/cascade_limit.csv.

    python data_scripts/cascade_limit.py EVENTS [--seed 0] [--geometry PATH] [--model small] --hardware "1 core of ..."

Events with more than --most photo-electrons are left out of the table: they take long, and are counted in its column `brighter` (so many before this one). It can be interrupted and called again: events of the seed that the table has from this simulation, model and commit are not worked out twice. Another seed adds other events."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from iceaggr.direction import angles_to_vector
from iceaggr.limit import angle, cascade_limit, observed_cascades
from iceaggr.model import HierarchicalTransformer
from iceaggr.reading import replacing
from iceaggr.simulation import VERSION, make_detector
from iceaggr.training import source_commit

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--geometry", help="default: the nominal detector")
    parser.add_argument("--model", default="small")
    parser.add_argument("--most", type=int, default=500, help="photo-electrons")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cascade_limit.csv"))
    args = parser.parse_args()

    detector, model = make_detector(args.geometry), HierarchicalTransformer.from_pretrained(args.model)
    cascades = observed_cascades(np.random.default_rng(args.seed), detector, args.events)
    pulses = pd.concat([c["pulses"].assign(event_id=k) for k, c in enumerate(cascades)], ignore_index=True)
    found = model.predict(pulses).sort_values("event_id")
    vectors = -angles_to_vector(*torch.from_numpy(found[["azimuth", "zenith"]].to_numpy().copy()).T).numpy()     # of flight
    args.out.parent.mkdir(parents=True, exist_ok=True)
    same = dict(seed=args.seed, model=args.model, simulation=VERSION, commit=source_commit() or "")
    rows = [pd.read_csv(args.out, dtype=str, keep_default_na=False)] if args.out.exists() else []        # as text: no digit changes
    done = {int(k) for t in rows for k in t.event[(t[list(same)] == pd.Series(same).astype(str)).all(axis=1)]}
    few = [len(c["sensor"]) <= args.most for c in cascades]
    for k in tqdm([k for k in np.flatnonzero(few) if k not in done], "cascades"):
        c = cascades[k]
        row = dict(seed=args.seed, event=k, energy=c["energy"], photo_electrons=len(c["sensor"]), sensors=len(np.unique(c["sensor"])), pulses=len(c["pulses"]), **cascade_limit(detector, c, seed=k), expected_of_hit_doms=cascade_limit(detector, c, seed=k, dark=False)["expected"],
                   model_error=float(angle(vectors[k], c["direction"])), kappa=found.kappa.iloc[k], model=args.model, brighter=few[:k].count(False), simulation=VERSION, commit=same["commit"], hardware=args.hardware, model_commit=same["commit"])
        rows.append(pd.DataFrame([row]))
        with replacing(args.out) as part: pd.concat(rows).to_csv(part, index=False)
