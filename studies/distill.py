"""Train on targets that mix the truth with predictions of other models (distillation).

    python studies/distill.py DATA RUN --predictions FILE [FILE ...] [--share 0.7] [--set minutes=30 lr=4e-4]

FILEs are made by `iceaggr predict` for all training files, .parquet or .csv with kappa. The target of an
event is the mean direction of what these models think possible, for the given share, and else the truth."""
import argparse
import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from iceaggr.common import DataError, shorten
from iceaggr.direction import angles_to_vector, vmf_resultant
from iceaggr.evaluation import read_predictions
from iceaggr.training import TrainSettings, train


def read_mean_directions(path):
    "Mean direction of each predicted distribution, a vector of length below 1, by event_id."
    table = read_predictions(path)
    if "kappa" not in table: raise DataError(f"{path}: no column kappa: predict with iceaggr")
    columns = table[["azimuth", "zenith", "kappa"]].to_numpy(np.float64)
    azimuth, zenith, kappa = torch.tensor(columns).T
    vector = angles_to_vector(azimuth, zenith) * vmf_resultant(kappa)[:, None]
    return pd.DataFrame(vector.numpy(), index=pd.Index(table.event_id, name="event_id"))


class DistillationTargets:
    "Function of event ids and true directions for `train(targets=...)`."
    def __init__(self, paths, share):
        if not 0 < share <= 1: raise ValueError(f"share must be above 0 and at most 1; got {share}")
        self.tables = {path: read_mean_directions(path) for path in paths}
        self.share = share

    def __call__(self, event_ids, truth):
        means = [self.look_up(path, event_ids.numpy()) for path in self.tables]
        predicted = torch.from_numpy(np.mean(means, axis=0)).to(truth)
        return self.share * predicted + (1 - self.share) * truth

    def look_up(self, path, event_ids):
        "Rows of a table; DataError if an event has no prediction."
        rows = self.tables[path].reindex(event_ids)
        missing = rows.index[rows[0].isna()]
        if len(missing):
            raise DataError(f"{path}: {len(missing):,} of {len(rows):,} training events have no prediction: "
                            f"{shorten(missing)}; predict all files to train on")
        return rows.to_numpy()


def read_setting(text):
    "name=value of a training setting, with the type of its default."
    name, value = text.split("=")
    kinds = {field.name: field.type for field in dataclasses.fields(TrainSettings)}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"no training setting {name}: choose one of {', '.join(kinds)}")
    if "bool" in str(kinds[name]): return name, value == "True"
    if "str" in str(kinds[name]): return name, value
    return name, int(value) if value.lstrip("-").isdigit() else float(value)


def read_numbers(text):
    "Numbers separated by commas."
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("run", type=Path)
    parser.add_argument("--predictions", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--share", type=float, default=0.7)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--init", help="initial weights")
    parser.add_argument("--train-batches", type=read_numbers, metavar="1,2")
    parser.add_argument("--valid-batches", type=read_numbers, metavar="3")
    parser.add_argument("--set", nargs="*", type=read_setting, default=[], metavar="NAME=VALUE")
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    train(args.data, args.run, args.preset, args.train_batches, args.valid_batches,
          TrainSettings(**dict(args.set)), args.init, args.resume,
          targets=DistillationTargets(args.predictions, args.share))
