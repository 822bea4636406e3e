"""Work out how well simulated cascades could be measured, beside what a pretrained model makes of their pulses, and append each event to benchmarks/results/cascade_limit.csv.

    python data_scripts/cascade_limit.py EVENTS [--seed 0] [--geometry PATH] [--model small] --hardware "1 core of ..."

Events with more than --most photo-electrons are left out of the table: they take long, and are counted in its column `brighter` (so many before this one). It can be interrupted; another seed adds other events."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from iceaggr.direction import angles_to_vector
from iceaggr.limit import angle, cascade_limit, observed_cascades
from iceaggr.model import HierarchicalTransformer
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
    few = [len(c["sensor"]) <= args.most for c in cascades]
    for k in tqdm(np.flatnonzero(few), "cascades"):
        c = cascades[k]
        row = dict(seed=args.seed, event=k, energy=c["energy"], photo_electrons=len(c["sensor"]), sensors=len(np.unique(c["sensor"])), pulses=len(c["pulses"]), **cascade_limit(detector, c, seed=k), expected_of_hit_doms=cascade_limit(detector, c, seed=k, dark=False)["expected"],
                   model_error=float(angle(vectors[k], c["direction"])), kappa=found.kappa.iloc[k], model=args.model, brighter=few[:k].count(False), simulation=VERSION, commit=source_commit(), hardware=args.hardware)
        pd.DataFrame([row]).to_csv(args.out, mode="a", header=not args.out.exists(), index=False)
