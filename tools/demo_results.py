"""The last lines of `make demo`: mean errors, report, display.

    python tools/demo_results.py RUN PRETRAINED     (folders with a metrics.json of `iceaggr evaluate`)"""
import json
import sys
from pathlib import Path


def demo_lines(run, pretrained):
    "What a person wants to know after the demo."
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (run, pretrained))
    errors = {"trained here": mine["model"], "pretrained": theirs["model"], "line fit": mine["line_fit"]}
    values = ", ".join(f"{name} {found['mean_degrees']:.1f}" for name, found in errors.items())
    return [
        f"mean error of {mine['n_events']:,} events [degrees]: {values}",
        f"report:  {run / 'report.html'}; of the pretrained model: {pretrained / 'report.html'}",
        f"display: {run / 'event.html'}",
    ]


if __name__ == "__main__":
    print(*demo_lines(*map(Path, sys.argv[1:])), sep="\n")
