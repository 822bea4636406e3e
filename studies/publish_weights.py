"""Put the best weights of a run into the package, with a model card of one page.

    python studies/publish_weights.py NAME METRICS --stage "simulated events" RUN [--stage "PPC events" RUN]
        --hardware "1 core of ..." [--average FOLDER HOW]

METRICS is the metrics.json of `iceaggr evaluate` for predictions of these weights, on events that no stage
was trained on (the files of the last stage are compared). Stages are the runs in order. With --average the
weights are those of FOLDER, made by average_weights.py, and HOW says in words how."""
import argparse
import json
import os
import shutil
from pathlib import Path

import pandas as pd

from iceaggr.model import HierarchicalTransformer

CARD = """# {name}

Weights for `HierarchicalTransformer.from_pretrained("{name}")`: {parameters:,} parameters.

| | |
|---|---|
| task | direction of a neutrino in IceCube (86 strings) |
| input | pulses: time, charge, sensor, auxiliary flag |
| output | direction and kappa, calibrated on held-out events (factor {factor:.3f}, power {power:.3f}) |

## How it was made

{stages}

Hardware: {hardware}. {choice}

## How accurate it is

{events:,} events of file {files} of the data set `{data}`:

{errors}

{cones}

## Limits

- Trained on events of one neutrino each, from all directions. No coincident muons, no saturated DOMs.
- Recorded data differ: most triggers are atmospheric muons, which these weights were not trained on.
  Fine-tune on the simulation of the collaboration and compare kappa and zenith
  between data and simulation before use.
- Detectors with sensors more than 1 m from the surveyed IceCube geometry are refused. Other ice and other DOM
  efficiencies were not tested.
- Cones of the most confident events are too wide: see [23_pretrained](../../nbs/23_pretrained.ipynb).
"""


def stage_row(number, data, run, last):
    "Row of the table of stages; `last`: the last epoch counts, else the best one."
    settings, log = json.loads((run / "settings.json").read_text()), pd.read_csv(run / "log.csv")
    training = settings["train"]
    epoch = log.iloc[-1] if last else log.loc[log.held_out_mean_degrees.idxmin()]
    trained = settings["train_events"] * (training["held_out"] - 1) // training["held_out"]
    return {"stage": number, "data": data, "events": f"{trained:,}", "steps": f"{epoch.step:,.0f}",
            "minutes": f"{log.minutes.iloc[-1]:.0f}", "learning rate": f"{training['lr']:g}"}


def markdown_table(rows):
    "Rows (dicts with the same keys) as Markdown."
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[k]) for k in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def error_rows(metrics):
    "Mean and median errors of all events, and medians by kind."
    kinds = {"all events, mean": ("mean_degrees", metrics), "all events, median": ("median_degrees", metrics)}
    for kind in metrics["by"].get("type", []):
        kinds[f"{kind['name'].replace('_', ' ')}, median"] = ("median", kind)
    return [{"angular error [degrees]": label, "model": f"{values['model'][key]:.2f}",
             "line fit": f"{values['line_fit'][key]:.2f}"} for label, (key, values) in kinds.items()]


def write_card(name, model, stages, metrics, hardware, choice):
    "The model card."
    coverage = metrics["calibration"]["coverage"].items()
    factor, power = model.t2.calibration.tolist()
    return CARD.format(
        name=name, parameters=sum(p.numel() for p in model.parameters()), factor=factor, power=power,
        stages=markdown_table(stages), hardware=hardware, choice=choice, events=metrics["n_events"],
        files=", ".join(map(str, metrics["batches"])), data=metrics["data"]["name"],
        errors=markdown_table(error_rows(metrics)),
        cones=markdown_table([{"cone": f"{k} %", "events inside": f"{100 * v:.1f} %"} for k, v in coverage]))


def copy_atomically(source, target):
    "Copy a file next to its place, then rename it."
    part = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, part)
    os.replace(part, target)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--stage", nargs=2, action="append", required=True, metavar=("DATA", "RUN"))
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--average", nargs=2, metavar=("FOLDER", "HOW"))
    parser.add_argument("--out", type=Path, default=Path("iceaggr/pretrained"))
    return parser.parse_args(), parser.error


def main():
    args, error = parse_arguments()
    last_run = Path(args.stage[-1][1])
    folder, choice = last_run, "The epoch was chosen on held-out training events."
    if args.average: folder, choice = Path(args.average[0]), args.average[1]
    metrics = json.loads(args.metrics.read_text())
    trained = json.loads((last_run / "settings.json").read_text())["train_batches"]
    if set(metrics["batches"]) & set(trained):
        error(f"the last stage was trained on files {trained}, and the metrics are of {metrics['batches']}")
    stages = [stage_row(i + 1, data, Path(run), bool(args.average) and i > 0)
              for i, (data, run) in enumerate(args.stage)]
    model = HierarchicalTransformer.load(folder)
    card = write_card(args.name, model, stages, metrics, args.hardware, choice)
    args.out.mkdir(exist_ok=True)
    copy_atomically(folder / "best.safetensors", args.out / f"{args.name}.safetensors")
    (args.out / f"{args.name}.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__": main()
