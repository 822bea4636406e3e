"""Judge the pretrained models on events with a coincident muon and with saturation, by the number of pulses.

    python studies/faults_by_brightness.py [--chunks 4] [--models small base]

Simulated events of the mix `whole_range`, a hundred per chunk. One row per model, fault and bin of pulses in
studies/results/faults_by_brightness.csv, in place of those of the same models before."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from iceaggr.common import atomic_write
from iceaggr.evaluation import event_errors
from iceaggr.model import HierarchicalTransformer
from iceaggr.simulation.dataset import VERSION, make_detector, pulse_frame, simulate_chunk
from iceaggr.simulation.neutrinos import SimulationSettings
from iceaggr.studies.detector_faults import muon_pulses, with_muons

RESULTS = Path(__file__).parent / "results/faults_by_brightness.csv"
BINS = [0, 100, 1_000, 10_000, 1_000_000]
SEED = 21


def faulty_events(chunk, detector):
    "Truth of a hundred events, and their pulses under each fault."
    found = {}
    for fault, saturation in (("none", False), ("saturation", True)):
        settings = SimulationSettings("whole_range", saturation=saturation)
        pulses, truth = simulate_chunk(detector, SEED, chunk, settings)
        found[fault] = pulse_frame(pulses, 0)
    assert (found["none"].time == found["saturation"].time).all()  # the same events, other charges
    rng = np.random.default_rng([SEED, chunk])
    found["coincident muon"] = with_muons(found["none"], muon_pulses(detector, SEED + 1 + chunk), rng)
    return truth.assign(event_id=np.arange(len(truth))), found


def judge(model, chunks):
    "Error and cone of each event under each fault."
    detector, tables = make_detector(), []
    for chunk in range(chunks):
        truth, found = faulty_events(chunk, detector)
        size = found["none"].groupby("event_id").size()
        for fault, pulses in found.items():
            events = event_errors(model.predict(pulses), truth).sort_values("event_id")
            tables.append(events.assign(fault=fault, pulses=size.loc[events.event_id].to_numpy()))
    return pd.concat(tables)


def rows(label, events):
    "Rows of the table for one model."
    without = events[events.fault == "none"].error.to_numpy()
    for fault, some in events.groupby("fault", sort=False):
        change = pd.Series(some.error.to_numpy() - without, some.index)
        groups = np.digitize(some.pulses, BINS) - 1
        for k in np.unique(groups):
            part, moved = some[groups == k], change[groups == k]
            yield dict(model=label, fault=fault, low=BINS[k], high=BINS[k + 1], events=len(part),
                       median=part.error.median(), change=moved.mean(), change_se=moved.sem(),
                       inside=(part.error <= part.r68).mean(), simulation=VERSION)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--models", nargs="+", default=["small", "base"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    for name in args.models:
        model = HierarchicalTransformer.from_pretrained(name)
        found = pd.DataFrame(list(rows(name, judge(model, args.chunks))))
        before = [pd.read_csv(args.out)] if args.out.exists() else []
        kept = [table[table.model != name] for table in before]
        with atomic_write(args.out) as part: pd.concat([*kept, found]).to_csv(part, index=False)


if __name__ == "__main__": main()
