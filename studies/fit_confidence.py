"""Train the head of confidence of a model, all else frozen, and calibrate kappa for all brightnesses.

    python studies/fit_confidence.py WEIGHTS OUT --events DIR:1,2 [DIR:3 ...] --held-out DIR:4 [...]
        [--average FILE --share 0.5]

The events are passed through the model once. Then the head learns their errors by the von Mises-Fisher loss,
in seconds. Factor and power of the calibration are those for which the shares of the held-out events inside
their 68 % cones come nearest to 68 % in all bins of pulses, tracks and cascades apart (by truth.parquet).
With --average, the weights are first averaged with those of FILE, which count for the given share."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, angular_error, vmf_loss, vmf_quantile
from iceaggr.model import HierarchicalTransformer, predict_dataset, ranges_of_events

BINS = 0, 30, 100, 300, 1_000, 3_000, 10_000, 10**9


def read_part(text):
    "Folder and files of DIR:1,2."
    folder, _, files = text.rpartition(":")
    return Path(folder), [int(x) for x in files.split(",")]


@torch.no_grad()
def pooled_events(model, folder, files):
    "Pooled embedding (B, C) of each event, its error [rad] and kappa without head, and its row of the truth."
    dataset, pooled = IceCubeDataset(folder, batch_ids=files), []
    vector_of = model.t2.vector_of

    def keep(x):
        pooled.append(x)
        return vector_of(x)

    model.t2.vector_of = keep
    table = predict_dataset(model, dataset)
    del model.t2.vector_of
    found = angles_to_vector(*torch.tensor(table[["azimuth", "zenith"]].to_numpy(np.float64)).T)
    true = angles_to_vector(*torch.from_numpy(dataset.targets.astype(np.float64)).T)
    types = pd.read_parquet(folder / "truth.parquet")[["batch_id", "event_id", "type"]]
    truth = dataset.event_table().merge(types, on=["batch_id", "event_id"], validate="one_to_one")
    kappa = torch.tensor(table.kappa.to_numpy(np.float64))
    return torch.cat(pooled), angular_error(found, true), kappa, truth


def loss_of(kappa, error):
    "Von Mises-Fisher loss of events with these errors."
    ahead = torch.tensor([0., 0., 1.], dtype=torch.float64).expand(len(error), 3)
    offset = torch.stack([error.sin(), torch.zeros_like(error), error.cos()], 1)
    return vmf_loss(offset * kappa[:, None], ahead)


def fit(head, pooled, error, kappa, epochs=40, batch=2_048):
    "Train the head on all events."
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=1e-3)
    steps = epochs * -(-len(pooled) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(pooled)).split(batch):
            log_factor = head(pooled[rows]).double().squeeze(1).clamp(-8, 8)
            loss_of(kappa[rows] * log_factor.exp(), error[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def calibration_of(error, kappa, truth):
    "Factor and power of kappa."
    groups = [truth.type.to_numpy() == "cascade", np.digitize(truth.n_pulses, BINS)]
    rows = [r for r in pd.DataFrame(index=range(len(truth))).groupby(groups).indices.values() if len(r) >= 20]
    best = np.inf, 1., 1.
    for power in np.arange(0.90, 1.20, 0.01):
        for factor in np.exp(np.arange(-0.8, 0.8, 0.02)):
            inside = (error <= vmf_quantile(factor * kappa**power, 0.68)).numpy()
            distance = sum(len(r)**0.75 * (inside[r].mean() - 0.68)**2 for r in rows)
            best = min(best, (distance, factor, power))
    return best[1:]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("out", type=Path)
    for name in ("--events", "--held-out"):
        parser.add_argument(name, type=read_part, nargs="+", required=True, metavar="DIR:FILES")
    parser.add_argument("--average", metavar="FILE")
    parser.add_argument("--share", type=float, default=0.5, help="of FILE; default %(default)s")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = HierarchicalTransformer.load(args.weights)
    if args.average:
        other = HierarchicalTransformer.load(args.average)
        with torch.no_grad():
            for p, q in zip(model.parameters(), other.parameters(), strict=True): p.lerp_(q, args.share)
    model.t2.calibration.fill_(1.)
    nn.init.zeros_(model.t2.confidence[-1].weight)
    nn.init.zeros_(model.t2.confidence[-1].bias)
    parts = [pooled_events(model, *part) for part in args.events]
    pooled, error, kappa = (torch.cat([part[i] for part in parts]) for i in range(3))
    fit(model.t2.confidence, pooled, error, kappa)
    parts = [pooled_events(model, *part) for part in args.held_out]
    error, kappa = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    truth = pd.concat([part[3] for part in parts], ignore_index=True)
    model.t2.calibration.copy_(torch.tensor(calibration_of(error, kappa, truth)))
    ranges = [ranges_of_events(IceCubeDataset(folder, batch_ids=files)) for folder, files in args.events]
    model.seen = {name: [min(r[name][0] for r in ranges), max(r[name][1] for r in ranges)]
                  for name in ranges[0]}
    model.save(args.out)
    print(f"{args.out}: factor {model.t2.calibration[0]:.3f}, power {model.t2.calibration[1]:.3f}")


if __name__ == "__main__": main()
