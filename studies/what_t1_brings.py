"""Train models with and without parts of T1 for equal times, and judge them by the brightness of events.

    python studies/what_t1_brings.py make DATA --typical DIR --whole DIR --bright DIR
    python studies/what_t1_brings.py train DATA METHOD [METHOD ...] --seeds 0,1,2 --minutes 5 --hardware "..."

`make` writes DATA: file 1 to train on, with the events of --typical and those of 300 to 3,000 pulses of
--whole (simulated with the mixes ppc and whole_range), except a tenth; file 2 with that tenth of both, of
any size; file 3 with the events of --bright (PPC). `train` adds rows to studies/results/what_t1_brings.csv.
Minutes are processor time; with OMP_NUM_THREADS=1, of one core.

METHOD: hierarchy (the small model), pooling (no layers in T1), mean (neither layers nor attention pooling),
first-8 (first 8 pulses of each DOM, concatenated), flat (these of the 128 earliest DOMs only), summary (first
time, charge, count and the times at which 10, 50 and 90 % of the charge have come)."""
import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))
from event_files import chosen_events, joined_events, read_events, write_events

from iceaggr.common import atomic_write
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, angular_error, vmf_loss, vmf_quantile
from iceaggr.engine.checkpoints import source_commit
from iceaggr.geometry import load_geometry
from iceaggr.io.kaggle import find_batches
from iceaggr.model import model_settings, predict_dataset
from iceaggr.studies.ablations import Ablation
from iceaggr.studies.baselines import DOMSummaries, FirstPulsesOfAll, FlatTransformer
from iceaggr.training import TrainSettings, fit

METHODS = {
    "hierarchy": Ablation("nothing"),
    "pooling": Ablation("attention inside DOMs", model=dict(dom_layers=0)),
    "mean": Ablation("attention inside DOMs, attention pooling", model=dict(dom_layers=0, pool="mean")),
    "first-8": Ablation("later pulses of a DOM", FirstPulsesOfAll),
    "flat": Ablation("later pulses and later DOMs", FlatTransformer),
    "summary": Ablation("pulses", DOMSummaries),
}
BINS = 0, 100, 300, 1_000, 3_000, 10_000, 1_000_000
RESULTS = Path(__file__).parent / "results/what_t1_brings.csv"


def make(args):
    "Write the data set."
    def read(folder): return read_events(folder, find_batches(folder))
    typical, whole = read(args.typical), read(args.whole)
    n = np.bincount(whole[0].event)
    kept = [np.arange(len(truth)) % 10 == 9 for _, truth in (typical, whole)]
    bright = (n >= 300) & (n < 3_000)
    train = joined_events(chosen_events(*typical, ~kept[0]), chosen_events(*whole, ~kept[1] & bright))
    judge = joined_events(chosen_events(*typical, kept[0]), chosen_events(*whole, kept[1]))
    files = [(1, *train), (2, *judge), (3, *read(args.bright))]
    write_events(args.data, load_geometry(args.typical), files)


def figures(model, data, file, name):
    "Median and mean error and mean loss per bin of pulses, tracks and cascades apart."
    dataset = IceCubeDataset(data, batch_ids=[file])
    table, truth = predict_dataset(model, dataset, progress=False), pd.read_parquet(data / "truth.parquet")
    types = dataset.event_table().merge(truth, on=["batch_id", "event_id"], validate="one_to_one").type
    predicted = angles_to_vector(*torch.tensor(table[["azimuth", "zenith"]].to_numpy(np.float64)).T)
    true = angles_to_vector(*torch.from_numpy(dataset.targets.astype(np.float64)).T)
    error, kappa = angular_error(predicted, true), torch.tensor(table.kappa.to_numpy(np.float64))
    loss = vmf_loss(predicted * kappa[:, None], true, "none").numpy()
    events = pd.DataFrame(dict(kind=types.where(types == "cascade", "track"), error=np.degrees(error.numpy()),
                               loss=loss, inside=(error <= vmf_quantile(kappa, 0.68)).numpy()))
    for (kind, k), part in events.groupby(["kind", np.digitize(dataset.n_pulses, BINS) - 1]):
        yield dict(data=name, kind=kind, low=BINS[k], high=BINS[k + 1], events=len(part),
                   median=part.error.median(), mean=part.error.mean(), loss=part.loss.mean(),
                   inside=part.inside.mean())


def train(args, method, seed):
    "Rows of the table for one training."
    torch.manual_seed(seed)
    data = IceCubeDataset(args.data, batch_ids=[1])
    valid = IceCubeDataset(args.data, batch_ids=[2], max_events=256)
    change = METHODS[method]
    model = change.kind({**vars(model_settings("small")), **change.model}, data.geometry)
    with tempfile.TemporaryDirectory() as run:
        settings = TrainSettings(minutes=args.minutes, seed=seed, held_out=50)
        log = fit(model, data, valid, run, settings, clock=time.process_time, progress=False)
        best = change.kind.load(run)
    about = dict(method=method, seed=seed, commit=source_commit(), minutes=args.minutes,
                 steps=int(log.step.iloc[-1]), hardware=args.hardware)
    rows = [about | row for file, name in ((2, "simulated"), (3, "ppc_bright"))
            for row in figures(best, args.data, file, name)]
    tables = [pd.read_csv(RESULTS)] if RESULTS.exists() else []
    with atomic_write(RESULTS) as part: pd.concat([*tables, pd.DataFrame(rows)]).to_csv(part, index=False)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("make", "train"):
        p = verbs.add_parser(verb)
        p.add_argument("data", type=Path)
        if verb == "make":
            for name in ("--typical", "--whole", "--bright"): p.add_argument(name, type=Path, required=True)
            continue
        p.add_argument("methods", nargs="+", choices=METHODS)
        p.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0, 1, 2])
        p.add_argument("--minutes", type=float, default=5.)
        p.add_argument("--hardware", required=True)
    args = parser.parse_args()
    if args.verb == "make": return make(args)
    for seed in args.seeds:
        for method in args.methods:
            start = time.time()
            train(args, method, seed)
            print(f"{method}, seed {seed}: {(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__": main()
