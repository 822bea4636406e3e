"""Judge models by the brightness of events: errors, and shares inside the 68 % cones.

    python studies/judge_by_brightness.py LABEL=WEIGHTS [...] --data DIR:4 [DIR:2 ...] --out FILE.csv

One row per model, data set, kind (track or cascade) and bin of pulses, in place of those before."""
import argparse
from pathlib import Path

import pandas as pd
from what_t1_brings import figures

from iceaggr.common import atomic_write
from iceaggr.model import HierarchicalTransformer


def rows(label, weights, parts):
    "Rows of one model."
    model = HierarchicalTransformer.load(weights)
    for part in parts:
        folder, _, file = part.rpartition(":")
        for row in figures(model, Path(folder), int(file), f"{Path(folder).name} {file}"):
            yield dict(model=label) | row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="LABEL=WEIGHTS")
    parser.add_argument("--data", nargs="+", required=True, metavar="DIR:FILE")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    models = dict(text.split("=", 1) for text in args.models)
    found = pd.DataFrame([row for label, path in models.items() for row in rows(label, path, args.data)])
    before = [pd.read_csv(args.out)] if args.out.exists() else []
    kept = [table[~table.model.isin(models)] for table in before]
    with atomic_write(args.out) as part: pd.concat([*kept, found]).to_csv(part, index=False)


if __name__ == "__main__": main()
