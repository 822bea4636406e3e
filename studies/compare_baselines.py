"""Train one method for some minutes, judge it on a file of its own, and append the result to studies/results/baselines.csv.

    python studies/compare_baselines.py METHOD --data DIR --train-batches 1,2,3 --test-batch 4 [--minutes 20] [--seed 0] [--lr] [--precision] --hardware "1 core of ..."

METHOD: hierarchy (the small model), mean (mean pooling in T1), flat and flat-plain (first pulses of the earliest DOMs, with this project's inputs or plain ones),
likelihood (a fit without learning, of --events events), or without-... (the small model without one of its choices).

Minutes are those of the processor, so that what else the machine does takes nothing from a method; with OMP_NUM_THREADS=1 they are minutes of one core."""
import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from iceaggr.studies.ablations import ABLATIONS, Ablation, predict_rotated
from iceaggr.studies.baselines import FlatTransformer, PlainFlatTransformer, fit_tracks
from iceaggr.data import IceCubeDataset
from iceaggr.evaluation import calibration, evaluate, event_errors, event_truth
from iceaggr.line_fit import line_fit_events
from iceaggr.model import model_settings, predict_dataset
from iceaggr.common import atomic_write
from iceaggr.engine.checkpoints import source_commit
from iceaggr.training import TrainSettings, choose_batches, fit

METHODS = {
    "hierarchy": Ablation("nothing"),
    "mean": Ablation("attention pooling", model={"pool": "mean"}),
    "flat": Ablation("T1", FlatTransformer),
    "flat-plain": Ablation("T1, inputs", PlainFlatTransformer),
} | ABLATIONS


def trained(method, args, test):
    "A network trained here, and how."
    torch.manual_seed(args.seed)
    batches, _ = choose_batches(args.data, args.train_batches, [args.test_batch])
    train, few = IceCubeDataset(args.data, batch_ids=batches, cache_size=len(batches)), IceCubeDataset(args.data, batch_ids=[args.test_batch], max_events=256)
    change = METHODS[method]
    model, settings = change.kind({**vars(model_settings("small")), **change.model}, train.geometry), TrainSettings(**{"minutes": args.minutes, "seed": args.seed, "lr": args.lr, "precision": args.precision, **change.train})
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98)) if change.adamw else None
    with tempfile.TemporaryDirectory() as run:
        log = fit(model, train, few, run, settings, optimizer=optimizer, clock=time.process_time)
        return change.kind.load(run), dict(minutes=settings.minutes, steps=int(log.step.iloc[-1]), lr=settings.lr, precision=settings.precision)


def table_row(method, predictions, test, args, training):
    "A row of the table."
    truth, lines = (t[t.event_id.isin(predictions.event_id)] for t in (event_truth(test, args.data), line_fit_events(test)))
    metrics, events = evaluate(predictions, truth, lines), event_errors(predictions, truth, lines)
    row = dict(method=method, commit=source_commit(), seed=args.seed, **training, hardware=args.hardware, data=Path(args.data).resolve().name, events=metrics["n_events"],
               mean=metrics["model"]["mean_degrees"], median=metrics["model"]["median_degrees"], line_fit_mean=metrics["line_fit"]["mean_degrees"])
    row |= {f"median_{k['name']}": k["model"]["median"] for k in metrics["by"].get("type", [])}
    row |= {f"coverage_{k}": v for k, v in metrics["calibration"].get("coverage", {}).items()}
    kinds = dict(tracks=events.type != "cascade", cascades=events.type == "cascade", below_50_pulses=events.n_pulses < 50, over_300_pulses=events.n_pulses > 300) if row.get("coverage_68") is not None and "type" in events else {}
    return row | {f"coverage_68_{name}": calibration(events[some])["coverage"]["68"] for name, some in kinds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=(*METHODS, "likelihood"))
    parser.add_argument("--data", required=True)
    parser.add_argument("--train-batches", type=lambda text: [int(x) for x in text.split(",")], metavar="1,2,3", help="default: all but the test file")
    parser.add_argument("--test-batch", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=TrainSettings.lr)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--events", type=int, default=300, help="events of the likelihood fit")
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--out", type=Path, default=Path("studies/results/baselines.csv"))
    args = parser.parse_args()

    test = IceCubeDataset(args.data, batch_ids=[args.test_batch])
    if args.method == "likelihood": rows = [table_row("likelihood", fit_tracks(test, np.sort(np.random.default_rng(args.seed).choice(len(test), min(args.events, len(test)), replace=False))), test, args, dict(minutes=0., steps=0))]
    else:
        model, training = trained(args.method, args, test)
        rows = [table_row(args.method, predict_dataset(model, test), test, args, training)]
        if args.method == "hierarchy": rows.append(table_row("hierarchy, six rotations", predict_rotated(model, test), test, args, training))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    old = [pd.read_csv(args.out)] if args.out.exists() else []
    with atomic_write(args.out) as part: pd.concat([*old, pd.DataFrame(rows)]).to_csv(part, index=False)
    print(pd.DataFrame(rows).T.to_string())
