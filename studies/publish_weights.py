"""Put the best weights of a run into the package, with a model card.

    python studies/publish_weights.py NAME METRICS --stage "simulated events" RUN [--stage "PPC events, files 1 to 3" RUN] --hardware "1 core of ..."

METRICS is the metrics.json that `iceaggr evaluate` wrote for predictions with these weights, of events that no stage was trained on, as the card says (the numbers of the files of the last stage are compared, those of the others may be of another data set); stages are the runs that they went through, in order. With --average FOLDER, made by average_weights.py, the weights
are those there, made of the last weights of the runs in the way that HOW tells."""
import argparse
import json
import os
import shutil
from pathlib import Path

import pandas as pd

from iceaggr.model import HierarchicalTransformer


def stage_row(data, run, last=False):
    "What is known of a run."
    settings, log = json.loads((run / "settings.json").read_text()), pd.read_csv(run / "log.csv")
    best = log.iloc[-1] if last else log.loc[log.held_out_mean_degrees.idxmin()]
    trained = settings["train_events"] * (settings["train"]["held_out"] - 1) // settings["train"]["held_out"]
    return {"data": data, "events trained on": f"{trained:,}", "epochs": f"{best.epoch:.0f} of {len(log)}", "steps": f"{best.step:,.0f}", "minutes": f"{log.minutes.iloc[-1]:.0f}", "batch": f"{settings['train']['batch_size']:,}", "peak learning rate": f"{settings['train']['lr']:g}",
            "seed": settings["train"]["seed"], "commit": settings["commit"]}


def table(rows):
    "Rows as Markdown."
    head = list(rows[0])
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(str(r[k]) for k in head) + " |" for r in rows)])


def card(name, model, stages, metrics, hardware, choice):
    "The model card."
    kinds = {k["name"].replace("_", " "): k for k in metrics["by"].get("type", [])}
    errors = [{"angular error [degrees]": what, "model": f"{m:.2f}", "line fit": f"{b:.2f}"} for what, m, b in (
        ("all events, mean", metrics["model"]["mean_degrees"], metrics["line_fit"]["mean_degrees"]), ("all events, median", metrics["model"]["median_degrees"], metrics["line_fit"]["median_degrees"]),
        *((f"{k}, median", v["model"]["median"], v["line_fit"]["median"]) for k, v in kinds.items()))]
    coverage = ", ".join(f"{k} % cone: {100 * v:.1f} %" for k, v in metrics["calibration"]["coverage"].items())
    factor, power = model.t2.calibration.tolist()
    return f"""# {name}

Weights for `HierarchicalTransformer.from_pretrained("{name}")`: {sum(p.numel() for p in model.parameters()):,} parameters. Directions of neutrinos seen by IceCube's 86 strings, from pulses with time, charge, sensor and auxiliary flag; kappa is calibrated on events kept back from training (factor {factor:.3f}, power {power:.3f}).

## How it was made

{table(stages)}

On {hardware}. {choice}

## How good it is

{metrics["n_events"]:,} events of file {", ".join(map(str, metrics["batches"]))} of the data set `{metrics["data"]["name"]}`, which it was not trained on:

{table(errors)}

Share of the events within their cones: {coverage}.

## What it is not for

Simulated and PPC events of one neutrino each, 200 GeV to 50 TeV with a thin tail above (of through-going tracks the energy of the muon), isotropic; no coincident muons, no saturated DOMs, no detectors with other sensor positions (refused beyond 1 m). Recorded data differ from both: most triggers are atmospheric muons, which these weights have never seen. What another ice or another efficiency of the DOMs does was not tested. Cones of the surest events are too wide (the notebook 12d_pretrained has by how much): their kappa is no weight for a point source without a correction. Fine-tune on the simulation of the collaboration, and compare what comes out (kappa, zeniths) between data and simulation before use.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--stage", nargs=2, action="append", required=True, metavar=("DATA", "RUN"))
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--average", nargs=2, metavar=("FOLDER", "HOW"), help="where the average of the runs is, and how it was made")
    parser.add_argument("--out", type=Path, default=Path("iceaggr/pretrained"))
    args = parser.parse_args()
    run, last = Path(args.average[0] if args.average else args.stage[-1][1]), Path(args.stage[-1][1])
    metrics, settings = json.loads(args.metrics.read_text()), json.loads((last / "settings.json").read_text())
    if set(metrics["batches"]) & set(settings["train_batches"]): parser.error(f"the last stage was trained on files {settings['train_batches']}, and is judged on {metrics['batches']}")
    stages = [stage_row(data, Path(r), bool(args.average) and i > 0) for i, (data, r) in enumerate(args.stage)]
    text = card(args.name, HierarchicalTransformer.load(run), stages, metrics, args.hardware, args.average[1] if args.average else "Epochs are chosen by a tenth of the training events that is kept back.")
    args.out.mkdir(exist_ok=True)
    part = args.out / f".{args.name}.{os.getpid()}"
    shutil.copyfile(run / "best.safetensors", part)
    os.replace(part, args.out / f"{args.name}.safetensors")
    (args.out / f"{args.name}.md").write_text(text, encoding="utf-8")
    print(text)
