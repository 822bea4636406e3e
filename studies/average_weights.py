"""Average the weights of runs that started from the same weights; calibrate kappa on their held-out events.

    python studies/average_weights.py OUT --start FILE --share 0.5 --runs RUN [RUN ...] --data DIR

FILE holds the weights that all RUNs (folders of `iceaggr train --init FILE`) started from. They count for the
given share of the average; the last weights of the runs count equally for the rest. Of several shares the one
with the smallest mean error on the held-out events is taken, of those whose mean offset in zenith is within
1.5 standard errors of zero. With --judge-batches 101,102 only held-out events of these files choose and
calibrate. OUT is a folder like that of a run: best.safetensors, settings and log of the first RUN."""
import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from iceaggr.data import IceCubeDataset
from iceaggr.engine.checkpoints import read_checkpoint
from iceaggr.engine.loading import held_out_events
from iceaggr.evaluation import event_errors, event_truth, summary
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.training import calibrate


@torch.no_grad()
def average(start, models, share):
    "A model whose parameters are those of `start` for a share, and of the others for the rest."
    result = copy.deepcopy(start)
    for p, *others in zip(result.parameters(), *(m.parameters() for m in models), strict=True):
        p.mul_(share).add_(sum(others), alpha=(1 - share) / len(models))
    return result


def best_share(figures):
    "The share with the smallest mean error among those without a significant offset in zenith."
    upright = {share: m["mean_degrees"] for share, m in figures.items()
               if abs(m["bias_zenith_degrees"]) <= 1.5 * m["se_bias_zenith_degrees"]}
    if not upright:
        raise ValueError("every share leans in zenith: give smaller ones, or train the runs for longer")
    return min(upright, key=upright.get)


def find_held_out(dataset, settings, batches=None):
    "Numbers of the events that runs with these settings held out, of some files or of all."
    events = held_out_events(dataset, settings.held_out)
    if batches is not None:
        file = np.asarray(dataset.batch_ids)[dataset.file_of(events)]
        events = events[np.isin(file, batches)]
    return events[-settings.valid_events:]


def read_facts(args, error):
    "settings.json of the first run; an error if the runs cannot be averaged."
    facts = [json.loads((run / "settings.json").read_text()) for run in args.runs]
    events = {(tuple(f["train_batches"]), f["train"]["held_out"], f["train"]["valid_events"]) for f in facts}
    if len(events) > 1: error("the runs were trained on different events: no event is held out from all")
    for run in args.runs:
        if read_checkpoint(run)[0]["finished"]: continue
        error(f"{run} has not ended: continue with iceaggr train --resume")
    if args.out.exists() and any(args.out.iterdir()):
        error(f"{args.out} exists and is not empty: choose another folder")
    return facts[0]


def evaluate_shares(args, start, models, train, held_out):
    "Summary on the held-out events for each share."
    truth, figures = event_truth(train, args.data), {}
    for share in args.share:
        table = predict_dataset(average(start, models, share), train, held_out, progress=False)
        m = summary(event_errors(table, truth[truth.event_id.isin(table.event_id)]))
        figures[share] = m
        print(f"share {share:g}: mean error {m['mean_degrees']:.3f} degrees, "
              f"median {m['median_degrees']:.3f}, "
              f"offset in zenith {m['bias_zenith_degrees']:+.2f} +- {m['se_bias_zenith_degrees']:.2f}, "
              f"on {len(held_out):,} held-out events", flush=True)
    return figures


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--share", type=float, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--judge-batches", type=lambda text: [int(x) for x in text.split(",")],
                        metavar="101,102", help="default: all files that the runs were trained on")
    return parser.parse_args(), parser.error


def main():
    args, error = parse_arguments()
    facts = read_facts(args, error)
    train = IceCubeDataset(args.data, batch_ids=facts["train_batches"])
    missing = set(args.judge_batches or []) - set(train.batch_ids)
    if missing: error(f"the runs were not trained on files {sorted(missing)}: choose others")
    held_out = find_held_out(train, argparse.Namespace(**facts["train"]), args.judge_batches)
    if not len(held_out): error(f"no event of files {args.judge_batches} was held out: name larger ones")
    start = HierarchicalTransformer.load(args.start)
    models = [HierarchicalTransformer.load(run / "last.safetensors") for run in args.runs]
    figures = evaluate_shares(args, start, models, train, held_out)
    try: share = best_share(figures)
    except ValueError as e: error(str(e))
    model = average(start, models, share)
    factor, power = calibrate(model, train, held_out)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out / "best.safetensors")
    for name in ("settings.json", "log.csv"): shutil.copyfile(args.runs[0] / name, args.out / name)
    print(f"share {share:g} taken, kappa -> {factor:.3f} kappa ** {power:.3f}: {args.out}")


if __name__ == "__main__": main()
