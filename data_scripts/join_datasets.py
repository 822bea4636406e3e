"""Put files of several data sets with truth, of the same detector, into one: to fine-tune on two kinds of events at once.

    python data_scripts/join_datasets.py OUT DIR:8:30000 DIR2:1 DIR2:2 [...]

Each DIR:FILE names a file of a data set, with :N its first N events. In OUT they have the numbers 101, 102 and so on, in the order given, and their events new ids from 0 on."""
import argparse
from pathlib import Path

import numpy as np
from event_files import read_events, write_events

from iceaggr.geometry import load_geometry


def joined(parts):
    "The files of a data set made of parts (folder, file, most)."
    for number, (folder, file, most) in enumerate(parts, 101):
        pulses, truth = read_events(folder, [file], most)
        print(f"{number}: {len(truth):,} events of {folder}, file {file}", flush=True)
        yield number, pulses, truth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", metavar="DIR:FILE[:N]")
    args = parser.parse_args()
    parts = [(Path(folder), int(number), int(most[0]) if most else None) for folder, number, *most in (text.split(":") for text in args.files)]
    geometry = load_geometry(parts[0][0])
    for folder, *_ in parts:
        if not np.allclose(load_geometry(folder).xyz, geometry.xyz, atol=0.01): parser.error(f"{folder} is of another detector than {parts[0][0]}")
    write_events(args.out, geometry, joined(parts))
