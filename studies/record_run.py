"""Append the result of a training run to studies/results/pretrained.csv, which notebooks read.

    python studies/record_run.py RUN METRICS --hardware "2 cores of ..." [--trained-on NAME]

RUN is the folder that `iceaggr train` made, METRICS the metrics.json that `iceaggr evaluate` wrote for its predictions."""
import argparse
import json
from pathlib import Path

import pandas as pd

from iceaggr.model import PRESETS
from iceaggr.common import atomic_write

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
parser.add_argument("metrics", type=Path)
parser.add_argument("--hardware", required=True)
parser.add_argument("--trained-on", help="name of the data set of the run, where it is not the one that was predicted")
parser.add_argument("--out", type=Path, default=Path("studies/results/pretrained.csv"))
args = parser.parse_args()

settings, metrics = json.loads((args.run / "settings.json").read_text()), json.loads(args.metrics.read_text())
log, held_out = pd.read_csv(args.run / "log.csv"), settings["train"].get("held_out")
preset = [name for name, sizes in PRESETS.items() if vars(sizes) == settings["model"]]
row = dict(preset=preset[0] if preset else "", commit=settings["commit"], seed=settings["train"]["seed"], hardware=args.hardware, trained_on=args.trained_on or metrics["data"]["name"], train_events=settings["train_events"] * (held_out - 1) // held_out if held_out else settings["train_events"], data=metrics["data"]["name"], train_batches=" ".join(map(str, settings["train_batches"])),
           valid_batches=" ".join(map(str, metrics["batches"])), minutes=settings["train"]["minutes"] or log.minutes.iloc[-1], epochs=len(log), steps=int(log.step.iloc[-1]),
           batch_size=settings["train"]["batch_size"], precision=settings["train"]["precision"], lr=settings["train"]["lr"], training_events_per_s=log.events_per_s.median(), events=metrics["n_events"])
for who in ("model", "line_fit"):
    row |= {f"{who}_mean": metrics[who]["mean_degrees"], f"{who}_median": metrics[who]["median_degrees"]}
    row |= {f"{who}_median_{kind['name']}": kind[who]["median"] for kind in metrics["by"].get("type", [])}
args.out.parent.mkdir(parents=True, exist_ok=True)
old = [pd.read_csv(args.out)] if args.out.exists() else []
with atomic_write(args.out) as part: pd.concat([*old, pd.DataFrame([row])]).to_csv(part, index=False)
print(pd.Series(row).to_string())
