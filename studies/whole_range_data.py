"""Join data sets to train on the whole range of brightness; every tenth event of each calibrates.

    python studies/whole_range_data.py OUT --ppc DIR --other-ice DIR --bright DIR --simulated DIR [DIR ...]

Files 1 to 3 of DIR --ppc, 1 and 2 of --other-ice, 1 and 3 of --bright and all of --simulated are taken. Four
copies of the bright events with 10 to 95 % of their light are added. In OUT/events the files 101 to 104 hold
the events to train on, all sets mixed. Files 1 and on hold those kept: 1 ppc, 2 other ice, 3 bright, 4 and on
simulated.
"""
import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "data_scripts"))
from event_files import chosen_events, joined_events, read_events, write_events

from iceaggr.geometry import load_geometry
from iceaggr.io.kaggle import find_batches

HELD_OUT = 10     # one event in so many


def split(pulses, truth):
    "The events to train on and those held out, each as (pulses, truth)."
    out = np.arange(len(truth)) % HELD_OUT == HELD_OUT - 1
    return [chosen_events(pulses, truth, wanted) for wanted in (~out, out)]


def mixed_files(parts, n): # yields number, pulses, truth
    "So many files, numbered from 101 on, with every n-th event of each part: training opens a few at a time."
    for k in range(n):
        pieces = [chosen_events(p, t, np.arange(len(t)) % n == k) for p, t in parts]
        yield 101 + k, *joined_events(*pieces)


def dimmed(bright, files, out):
    "Copies of bright events with less light."
    script = Path(__file__).parents[1] / "data_scripts/thin_events.py"
    options = ["--files", ",".join(map(str, files)), "--copies", "4", "--seed", "33", "--least", "0.1"]
    subprocess.run([sys.executable, script, bright, out, *options], check=True)
    return read_events(out, find_batches(out))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name in ("--ppc", "--other-ice", "--bright"): parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--simulated", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    sets = [(args.ppc, [1, 2, 3]), (args.other_ice, [1, 2]), (args.bright, [1, 3])]
    sets += [(folder, find_batches(folder)) for folder in args.simulated]
    halves = [split(*read_events(folder, files)) for folder, files in sets]
    train = [half[0] for half in halves] + [dimmed(args.bright, [1, 3], args.out / "dimmed")]
    geometry = load_geometry(args.ppc)
    kept = [(number, *half[1]) for number, half in enumerate(halves, 1)]
    write_events(args.out / "events", geometry, [*mixed_files(train, 4), *kept])


if __name__ == "__main__": main()
