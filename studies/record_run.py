"""Append the result of a training run to studies/results/pretrained.csv, which notebooks read.

    python studies/record_run.py RUN METRICS --hardware "2 cores of ..." [--trained-on NAME]

RUN is the folder that `iceaggr train` made, METRICS the metrics.json of `iceaggr evaluate`."""
import argparse
import json
from pathlib import Path

import pandas as pd

from iceaggr.common import atomic_write
from iceaggr.model import PRESETS


def describe_training(run, hardware, trained_on):
    "Columns that come from the folder of the run."
    settings, log = json.loads((run / "settings.json").read_text()), pd.read_csv(run / "log.csv")
    training, trained = settings["train"], settings["train_events"]
    held_out = training.get("held_out")
    if held_out: trained = trained * (held_out - 1) // held_out
    presets = [name for name, sizes in PRESETS.items() if vars(sizes) == settings["model"]]
    return dict(
        preset=presets[0] if presets else "", commit=settings["commit"], seed=training["seed"],
        hardware=hardware, trained_on=trained_on, train_events=trained,
        train_batches=" ".join(map(str, settings["train_batches"])),
        minutes=training["minutes"] or log.minutes.iloc[-1], epochs=len(log), steps=int(log.step.iloc[-1]),
        batch_size=training["batch_size"], precision=training["precision"], lr=training["lr"],
        training_events_per_s=log.events_per_s.median())


def describe_errors(metrics):
    "Columns that come from metrics.json."
    row = dict(data=metrics["data"]["name"], valid_batches=" ".join(map(str, metrics["batches"])),
               events=metrics["n_events"])
    for method in ("model", "line_fit"):
        row[f"{method}_mean"] = metrics[method]["mean_degrees"]
        row[f"{method}_median"] = metrics[method]["median_degrees"]
        for kind in metrics["by"].get("type", []):
            row[f"{method}_median_{kind['name']}"] = kind[method]["median"]
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--trained-on", help="name of the run's data set, if not the one that was predicted")
    parser.add_argument("--out", type=Path, default=Path("studies/results/pretrained.csv"))
    args = parser.parse_args()
    metrics = json.loads(args.metrics.read_text())
    trained_on = args.trained_on or metrics["data"]["name"]
    row = describe_training(args.run, args.hardware, trained_on) | describe_errors(metrics)
    tables = [pd.read_csv(args.out)] if args.out.exists() else []
    tables.append(pd.DataFrame([row]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out) as part: pd.concat(tables).to_csv(part, index=False)
    print(pd.Series(row).to_string())
