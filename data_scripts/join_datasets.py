"""Join files of several data sets with truth, of the same detector, to fine-tune on two kinds of events at
once.

    python data_scripts/join_datasets.py OUT DIR:8:30000 DIR2:1 DIR2:2 [...]

Each DIR:FILE names a file of a data set, with :N its first N events. In OUT the files have the numbers
101, 102 and so on, in the order given. Their events have new ids from 0 on.
"""
import argparse
from pathlib import Path

import numpy as np
from event_files import read_events, write_events

from iceaggr.geometry import load_geometry


def parse_part(text):
    "Folder, file number and number of events of DIR:FILE[:N]."
    folder, number, *most = text.split(":")
    return Path(folder), int(number), int(most[0]) if most else None


def joined(parts):
    "Files of a data set made of parts (folder, file, most)."
    for number, (folder, file, most) in enumerate(parts, 101):
        pulses, truth = read_events(folder, [file], most)
        print(f"{number}: {len(truth):,} events of {folder}, file {file}", flush=True)
        yield number, pulses, truth


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", metavar="DIR:FILE[:N]")
    args = parser.parse_args()
    parts = [parse_part(text) for text in args.files]
    first = parts[0][0]
    geometry = load_geometry(first)
    for folder, *_ in parts:
        same = np.allclose(load_geometry(folder).xyz, geometry.xyz, atol=0.01)
        if not same: parser.error(f"{folder} is of another detector than {first}")
    write_events(args.out, geometry, joined(parts))
