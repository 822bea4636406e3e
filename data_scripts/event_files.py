"Shared by the scripts that make data sets of existing events: read events and truth, write a data set."
import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from iceaggr.io.writing import write_table
from iceaggr.simulation.dataset import write_batch
from iceaggr.simulation.neutrinos import MIXES

PULSE_COLUMNS = ("sensor_id", "time", "charge", "auxiliary")


def read_file(folder, file, meta, truth, most):
    "Pulses (event: 0, 1, ... in the file) and truth of at most the first `most` events."
    rows = meta[meta.batch_id == file].sort_values("first_pulse_index")[:most]
    if not len(rows):
        raise SystemExit(f"{folder} has no events of a file {file} in train_meta.parquet: name another file")
    pulses = pd.read_parquet(folder / "train" / f"batch_{file}.parquet")[:rows.last_pulse_index.iloc[-1] + 1]
    count = rows.last_pulse_index - rows.first_pulse_index + 1
    pulses = pulses.assign(event=np.repeat(np.arange(len(rows)), count))
    directions = rows[["batch_id", "event_id", "azimuth", "zenith"]]
    known = directions.merge(truth, on=["batch_id", "event_id"], validate="one_to_one")
    missing = len(rows) - len(known)
    if missing:
        raise SystemExit(f"{folder / 'truth.parquet'}: {missing:,} of {len(rows):,} events of file {file} "
                         "are missing; re-download it")
    return pulses, known


def read_events(folder, files, most=None):
    "Pulses (event: 0, 1, ... in the order of the files) and truth; at most the first `most` events per file."
    truth = pd.read_parquet(folder / "truth.parquet")
    meta = pd.read_parquet(folder / "train_meta.parquet")
    pulses, truths, n = [], [], 0
    for file in files:
        file_pulses, file_truth = read_file(folder, file, meta, truth, most)
        pulses.append(file_pulses.assign(event=file_pulses.event + n))
        truths.append(file_truth)
        n += len(file_truth)
    return pd.concat(pulses, ignore_index=True), pd.concat(truths, ignore_index=True)


def chosen_events(pulses, truth, wanted):
    "Some events (bool per event), numbered from 0 on."
    place = np.cumsum(wanted) - 1
    some = pulses[wanted[pulses.event]]
    return some.assign(event=place[some.event]), truth[wanted]


def joined_events(*parts):
    "Events of several (pulses, truth), one after another."
    before = np.cumsum([0, *(len(truth) for _, truth in parts)])
    pulses = [p.assign(event=p.event + first) for (p, _), first in zip(parts, before, strict=False)]
    return pd.concat(pulses, ignore_index=True), pd.concat([t for _, t in parts], ignore_index=True)


def command_line(doc):
    "Arguments that all scripts share that make events of others."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=lambda text: [int(x) for x in text.split(",")], metavar="1,2,3",
                        required=True)
    parser.add_argument("--held-out", type=int, default=10,
                        help="leave one event of so many out; default %(default)s")
    parser.add_argument("--mix", default="ppc", choices=MIXES, help="of the simulation; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser


def refuse_existing(out):
    "Exit where a data set would be overwritten."
    if out.exists(): raise SystemExit(f"{out} is there already: choose another folder")


def write_events(out, geometry, files):
    "Write a data set of files (number, pulses with event from 0 on, truth). Events get new ids."
    refuse_existing(out)
    making = out.with_name(f".{out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    (making / "train").mkdir(parents=True)
    metas, truths, n = [], [], 0
    for number, pulses, truth in files:
        truth = truth.assign(event_id=n + np.arange(len(truth)))
        columns = {c: pulses[c].to_numpy() for c in PULSE_COLUMNS}
        pulses = pd.DataFrame({"event_id": n + pulses.event.to_numpy(np.int64), **columns})
        metas.append(write_batch(making, number, pulses, truth))
        truths.append(truth.assign(batch_id=number).drop(columns=["azimuth", "zenith"]))
        n += len(truth)
    write_table(pd.concat(metas, ignore_index=True), making / "train_meta.parquet")
    write_table(pd.concat(truths, ignore_index=True), making / "truth.parquet")
    geometry.to_csv(making / "sensor_geometry.csv")
    making.rename(out)
