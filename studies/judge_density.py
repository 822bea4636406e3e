"""Compare the densities of a model with its single cones, by kind, pulses and zenith of events.

    python studies/judge_density.py WEIGHTS NAME --events DIR:4 [DIR:2 ...]

Adds rows to studies/results/density.csv: log-likelihood of the density and of the cone at the true
direction, shares of true directions inside regions and cones, and the areas of both. The areas at equal
coverage are those of the levels at which region and cone hold 90 % of the events of the group."""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fit_confidence import read_part

from iceaggr.common import atomic_write
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angular_error, vmf_loss, vmf_quantile
from iceaggr.engine.checkpoints import source_commit
from iceaggr.model import HierarchicalTransformer
from iceaggr.sky_density import pooled_events

RESULTS = Path(__file__).parent / "results/density.csv"
BINS = 0, 30, 100, 300, 1_000, 3_000, 10_000, 10**9
LEVELS = 0.5, 0.68, 0.9, 0.99


@torch.no_grad()
def judged_events(model, dataset):
    "One row per event: errors, log-likelihoods, credible levels, and what they are needed for."
    pooled, vector, true = (x.double() for x in pooled_events(model, dataset, progress=False))
    density = model.t2.sky(pooled.float(), vector.float()).double()
    kappa, error = vector.norm(dim=1), angular_error(vector, true)
    within = -torch.expm1(-kappa * (1 - error.cos())) / -torch.expm1(-2 * kappa)
    types = pd.read_parquet(dataset.root / "truth.parquet")[["batch_id", "event_id", "type"]]
    truth = dataset.event_table().merge(types, on=["batch_id", "event_id"], validate="one_to_one")
    columns = dict(
        error=error, median_error=angular_error(density.median_direction(), true), kappa=kappa,
        density=density.log_density(true), cone=-vmf_loss(vector, true, "none"),
        density_level=density.credible_level(true), cone_level=within)
    table = truth.assign(**{name: x.numpy() for name, x in columns.items()})
    return table, density


def areas(table, density):
    "Median area [square degrees] of regions and of cones that hold 90 % of the events."
    q = float(np.quantile(table.density_level, 0.9)), float(np.quantile(table.cone_level, 0.9))
    region = density[torch.from_numpy(table.index.to_numpy())].area(q[0])
    radius = vmf_quantile(torch.tensor(table.kappa.to_numpy()), q[1])
    cone = 2 * np.pi * (1 - radius.cos()) * np.degrees(1) ** 2
    return float(region.median()), float(cone.median())


def figures(table, density):
    "Rows of the results: all events, and those of each kind, bin of pulses and bin of zenith."
    kind = table.type.where(table.type == "cascade", "track")
    pulses = pd.Series(np.digitize(table.n_pulses, BINS) - 1).map(lambda k: f"{BINS[k]:,}")
    zenith = pd.Series(np.digitize(np.cos(table.zenith), (-0.5, 0, 0.5))).map(
        dict(enumerate(("120 to 180", "90 to 120", "60 to 90", "0 to 60"))))
    groups = dict(all=pd.Series("all", table.index), type=table.type, pulses=pulses, zenith=zenith,
                  kind_and_pulses=kind + " " + pulses)
    for name, labels in groups.items():
        for label, part in table.groupby(labels.to_numpy()):
            region, cone = areas(part, density)
            row = dict(group=name, label=label, events=len(part), error=np.degrees(part.error.mean()),
                       median_direction_error=np.degrees(part.median_error.mean()),
                       gain=(part.density - part.cone).mean(), area=region, cone_area=cone)
            for level in LEVELS:
                row |= {f"inside_{100 * level:.0f}": (part.density_level < level).mean(),
                        f"cone_inside_{100 * level:.0f}": (part.cone_level < level).mean()}
            yield row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("name", help="for the results, such as small")
    parser.add_argument("--events", type=read_part, nargs="+", required=True, metavar="DIR:FILES")
    args = parser.parse_args()
    model = HierarchicalTransformer.load(args.weights)
    tables = [pd.read_csv(RESULTS)] if RESULTS.exists() else []
    for folder, files in args.events:
        table, density = judged_events(model, IceCubeDataset(folder, batch_ids=files))
        name = f"{folder.name} {','.join(map(str, files))}"
        about = dict(model=args.name, commit=source_commit(), data=name)
        tables.append(pd.DataFrame([about | row for row in figures(table, density)]))
    with atomic_write(RESULTS) as part: pd.concat(tables).to_csv(part, index=False)


if __name__ == "__main__": main()
