"What the scripts share that make data sets of events at hand: reading events with their truth, and writing a data set beside its final name."
import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from iceaggr.simulation.dataset import write_batch, write_table
from iceaggr.simulation.neutrinos import MIXES


def read_events(folder, files, most=None):
    "Pulses (event: 0, 1, ... in the order of the files) and truth of the events of some files, of each at most the first `most`."
    pulses, truths, n = [], [], 0
    truth, meta = (pd.read_parquet(folder / f"{name}.parquet") for name in ("truth", "train_meta"))
    for file in files:
        rows = meta[meta.batch_id == file].sort_values("first_pulse_index")[:most]
        if not len(rows): raise SystemExit(f"{folder} has no events of a file {file} in train_meta.parquet: name another file")
        these = pd.read_parquet(folder / "train" / f"batch_{file}.parquet")[:rows.last_pulse_index.iloc[-1] + 1]
        pulses.append(these.assign(event=n + np.repeat(np.arange(len(rows)), rows.last_pulse_index - rows.first_pulse_index + 1)))
        truths.append(rows[["batch_id", "event_id", "azimuth", "zenith"]].merge(truth, on=["batch_id", "event_id"], validate="one_to_one"))
        if len(truths[-1]) < len(rows): raise SystemExit(f"{folder / 'truth.parquet'}: {len(rows) - len(truths[-1]):,} of {len(rows):,} events of file {file} are missing; get it again")
        n += len(rows)
    return pd.concat(pulses, ignore_index=True), pd.concat(truths, ignore_index=True)


def command_line(doc):
    "What all scripts are told that make events of others."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=lambda text: [int(x) for x in text.split(",")], metavar="1,2,3", required=True)
    parser.add_argument("--held-out", type=int, default=10, help="one event of so many is left out; default %(default)s")
    parser.add_argument("--mix", default="ppc", choices=MIXES, help="of the simulation; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    return parser


def refuse_existing(out):
    "A data set is not written over."
    if out.exists(): raise SystemExit(f"{out} is there already: choose another folder")


def write_events(out, geometry, files):
    "A data set of files (number, pulses with event from 0 on, truth with azimuth and zenith), whose events get new ids."
    refuse_existing(out)
    making = out.with_name(f".{out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    (making / "train").mkdir(parents=True)
    metas, truths, n = [], [], 0
    for number, pulses, truth in files:
        truth = truth.assign(event_id=n + np.arange(len(truth)))
        pulses = pd.DataFrame({"event_id": n + pulses.event.to_numpy(np.int64), **{c: pulses[c].to_numpy() for c in ("sensor_id", "time", "charge", "auxiliary")}})
        metas.append(write_batch(making, number, pulses, truth))
        truths.append(truth.assign(batch_id=number).drop(columns=["azimuth", "zenith"]))
        n += len(truth)
    write_table(pd.concat(metas, ignore_index=True), making / "train_meta.parquet")
    write_table(pd.concat(truths, ignore_index=True), making / "truth.parquet")
    geometry.to_csv(making / "sensor_geometry.csv")
    making.rename(out)
