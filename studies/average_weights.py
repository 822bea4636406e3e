"""Average the weights of runs that went on from the same weights, and calibrate the average on the events that these runs kept back.

    python studies/average_weights.py OUT --start FILE --share 0.5 --runs RUN [RUN ...] --data DIR [--judge-batches 101,102,103]

FILE holds the weights that all RUNs (folders made by `iceaggr train --init FILE`) started from; they count for the given share of the average, the last weights of the runs equally for the rest.
Several shares may be given: of those with which the mean offset in zenith on the events kept back is within one and a half standard errors of zero, the one with the smallest mean error is taken. (Weights that know simulated events
alone may lean: the simulation is not the detector.) With --judge-batches only events kept back from these files choose and calibrate: where a run was trained on several kinds of events, those that the weights are for. OUT is a folder like that of a run: best.safetensors, and the settings and the log of the first RUN."""
import argparse
import copy
import json
import shutil
from pathlib import Path

import numpy as np
import torch

from iceaggr.data import IceCubeDataset
from iceaggr.engine.loading import held_out_events
from iceaggr.evaluation import event_errors, event_truth, summary
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.engine.checkpoints import read_checkpoint
from iceaggr.training import TrainSettings, calibrate


def average(start, models, share):
    "A model whose parameters are those of `start` for a share, and of the others for the rest."
    model = copy.deepcopy(start)
    with torch.no_grad():
        for p, *others in zip(model.parameters(), *(m.parameters() for m in models)): p.mul_(share).add_(sum(others), alpha=(1 - share) / len(models))
    return model


def best_share(figures):
    "Of shares with their summaries on the events kept back, the one with the smallest mean error among those that do not lean in zenith."
    upright = {share: m["mean_degrees"] for share, m in figures.items() if abs(m["bias_zenith_degrees"]) <= 1.5 * m["se_bias_zenith_degrees"]}
    if not upright: raise ValueError("every share leans in zenith: give smaller ones, or train the runs for longer")
    return min(upright, key=upright.get)


def kept_back(dataset, settings, batches=None):
    "Numbers of the events of a data set that runs with these settings kept back, of some of its files or of all."
    events = held_out_events(dataset, settings.held_out)
    return events[-settings.valid_events:] if batches is None else events[np.isin(np.asarray(dataset.batch_ids)[dataset.file_of(events)], batches)][-settings.valid_events:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--start", type=Path, required=True)
    parser.add_argument("--share", type=float, nargs="+", required=True)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--judge-batches", type=lambda text: [int(x) for x in text.split(",")], metavar="101,102", help="default: all files that the runs were trained on")
    args = parser.parse_args()
    facts = [json.loads((run / "settings.json").read_text()) for run in args.runs]
    if len({(tuple(f["train_batches"]), f["train"]["held_out"], f["train"]["valid_events"]) for f in facts}) > 1: parser.error("the runs were trained on different events, so that none is left to all to judge by")
    for run in args.runs:
        if not read_checkpoint(run)[0]["finished"]: parser.error(f"{run} has not ended: go on with iceaggr train --resume")
    if args.out.exists() and any(args.out.iterdir()): parser.error(f"{args.out} exists and is not empty: choose another folder")
    settings = TrainSettings(**facts[0]["train"])
    train = IceCubeDataset(args.data, batch_ids=facts[0]["train_batches"])
    if missing := set(args.judge_batches or []) - set(train.batch_ids): parser.error(f"the runs were not trained on files {sorted(missing)}: from others no events were kept back")
    held_out = kept_back(train, settings, args.judge_batches)
    if not len(held_out): parser.error(f"no event of files {args.judge_batches} was kept back: name larger ones")
    start, models, figures, truth = HierarchicalTransformer.load(args.start), [HierarchicalTransformer.load(run / "last.safetensors") for run in args.runs], {}, event_truth(train, args.data)
    for share in args.share:
        table = predict_dataset(average(start, models, share), train, held_out, progress=False)
        m = figures[share] = summary(event_errors(table, truth[truth.event_id.isin(table.event_id)]))
        print(f"share {share:g}: mean error {m['mean_degrees']:.3f} degrees, median {m['median_degrees']:.3f}, offset in zenith {m['bias_zenith_degrees']:+.2f} +- {m['se_bias_zenith_degrees']:.2f}, on {len(held_out):,} events kept back", flush=True)
    try: share = best_share(figures)
    except ValueError as error: parser.error(str(error))
    model = average(start, models, share)
    factor, power = calibrate(model, train, held_out)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save(args.out / "best.safetensors")
    for name in ("settings.json", "log.csv"): shutil.copyfile(args.runs[0] / name, args.out / name)
    print(f"share {share:g} taken, kappa -> {factor:.3f} kappa ** {power:.3f}: {args.out}")
