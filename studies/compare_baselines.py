"""Train one method for some minutes, evaluate it on a file of its own, and append the result to a table.

    python studies/compare_baselines.py METHOD --data DIR --train-batches 1,2,3 --test-batch 4
        [--minutes 20] [--seed 0] [--lr 0.003] [--precision float32] --hardware "1 core of ..."

METHOD: hierarchy (the small model), mean (mean pooling in T1), flat and flat-plain (first pulses of the
earliest DOMs, with this project's inputs or plain ones), likelihood (a fit without learning, of --events
events), or without-... (the small model without one of its choices).

Minutes are processor time, so that other jobs on the machine take nothing from a method. With
OMP_NUM_THREADS=1 they are minutes of one core."""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from iceaggr.common import atomic_write
from iceaggr.data import IceCubeDataset
from iceaggr.engine.checkpoints import source_commit
from iceaggr.evaluation import calibration, evaluate, event_errors, event_truth
from iceaggr.line_fit import line_fit_events
from iceaggr.model import model_settings, predict_dataset
from iceaggr.studies.ablations import ABLATIONS, Ablation, predict_rotated
from iceaggr.studies.baselines import FlatTransformer, PlainFlatTransformer, fit_tracks
from iceaggr.training import TrainSettings, choose_batches, fit

METHODS = {
    "hierarchy": Ablation("nothing"),
    "mean": Ablation("attention pooling", model={"pool": "mean"}),
    "flat": Ablation("T1", FlatTransformer),
    "flat-plain": Ablation("T1, inputs", PlainFlatTransformer),
} | ABLATIONS


def train_method(args):
    "A model trained as the arguments say, and the columns of the table that describe its training."
    torch.manual_seed(args.seed)
    change = METHODS[args.method]
    batches, _ = choose_batches(args.data, args.train_batches, [args.test_batch])
    train = IceCubeDataset(args.data, batch_ids=batches, cache_size=len(batches))
    valid = IceCubeDataset(args.data, batch_ids=[args.test_batch], max_events=256)
    model = change.kind({**vars(model_settings("small")), **change.model}, train.geometry)
    options = dict(minutes=args.minutes, seed=args.seed, lr=args.lr, precision=args.precision)
    settings = TrainSettings(**{**options, **change.train})
    with tempfile.TemporaryDirectory() as run:
        log = fit(model, train, valid, run, settings, optimizer=change.optimizer(model, settings),
                  clock=time.process_time)
        best = change.kind.load(run)
    columns = dict(minutes=settings.minutes, steps=int(log.step.iloc[-1]), lr=settings.lr,
                   precision=settings.precision)
    return best, columns


def coverage_by_class(events):
    "Share of the events inside their 68 % cones, by type and brightness."
    cascade = events.type == "cascade"
    classes = {
        "tracks": ~cascade,
        "cascades": cascade,
        "below_50_pulses": events.n_pulses < 50,
        "over_300_pulses": events.n_pulses > 300,
    }
    return {f"coverage_68_{name}": calibration(events[chosen])["coverage"]["68"]
            for name, chosen in classes.items()}


def table_row(method, predictions, test, args, training):
    "One row of the table."
    tables = event_truth(test, args.data), line_fit_events(test)
    truth, lines = (table[table.event_id.isin(predictions.event_id)] for table in tables)
    metrics, events = evaluate(predictions, truth, lines), event_errors(predictions, truth, lines)
    row = dict(method=method, commit=source_commit(), seed=args.seed, **training, hardware=args.hardware,
               data=Path(args.data).resolve().name, events=metrics["n_events"],
               mean=metrics["model"]["mean_degrees"], median=metrics["model"]["median_degrees"],
               line_fit_mean=metrics["line_fit"]["mean_degrees"])
    row |= {f"median_{kind['name']}": kind["model"]["median"] for kind in metrics["by"].get("type", [])}
    coverage = metrics["calibration"].get("coverage", {})
    row |= {f"coverage_{share}": value for share, value in coverage.items()}
    if "68" in coverage and "type" in events: row |= coverage_by_class(events)
    return row


def likelihood_rows(test, args):
    "The likelihood fit of events drawn at random."
    rng = np.random.default_rng(args.seed)
    chosen = np.sort(rng.choice(len(test), min(args.events, len(test)), replace=False))
    return [table_row("likelihood", fit_tracks(test, chosen), test, args, dict(minutes=0.0, steps=0))]


def model_rows(test, args):
    "A model trained here; the hierarchy also with test-time augmentation."
    model, training = train_method(args)
    rows = [table_row(args.method, predict_dataset(model, test), test, args, training)]
    if args.method == "hierarchy":
        predictions = predict_rotated(model, test)
        rows.append(table_row("hierarchy, test-time augmentation", predictions, test, args, training))
    return rows


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=(*METHODS, "likelihood"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--train-batches", type=lambda text: [int(x) for x in text.split(",")],
                        metavar="1,2,3", help="default: all but the test file")
    parser.add_argument("--test-batch", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=TrainSettings.lr)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--events", type=int, default=300, help="events of the likelihood fit")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--out", type=Path, default=Path("studies/results/baselines.csv"))
    return parser.parse_args()


def append_rows(rows, path):
    "Add rows to the table, atomically."
    path.parent.mkdir(parents=True, exist_ok=True)
    old = [pd.read_csv(path)] if path.exists() else []
    with atomic_write(path) as part: pd.concat([*old, rows]).to_csv(part, index=False)


if __name__ == "__main__":
    args = read_arguments()
    test = IceCubeDataset(args.data, batch_ids=[args.test_batch])
    rows = pd.DataFrame((likelihood_rows if args.method == "likelihood" else model_rows)(test, args))
    append_rows(rows, args.out)
    print(rows.T.to_string())
