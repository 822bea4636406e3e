"""Dimmer events made of those of a data set with truth: some of the photo-electrons behind the pulses are taken away, as if less light had been made, the noise that went with them is put back, and the read-out triggers anew.

    python data_scripts/thin_events.py DATA OUT --files 1,2,3 --copies 4 --seed 1

Light adds up: with each photo-electron kept with the same probability, what is left is what a dimmer event of the same direction, place and kind would have shown. The probability of an event is drawn between --least and --most, its logarithm evenly.
Of the events, in the order of the files, every tenth (--held-out) is left out: training keeps these back. OUT has a file for each copy, without the events that no longer trigger; its truth is that of the source, and says
which it was (source_file, source_event) and what share of the light is left (light)."""
import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from iceaggr.geometry import load_geometry
from iceaggr.simulation import SimulationSettings, make_detector, noise_hits, pulse_frame, read_out, spe_charge, write_batch, write_table

PARTS, MARGIN = 200, 500.       # events are taken in so many parts; ns: noise begins so long before the earliest pulse that there can be, and ends so long after the last


def read_events(folder, files):
    "Pulses (event: 0, 1, ... in the order of the files), and the truth of these events."
    pulses, truths, n = [], [], 0
    truth, meta = (pd.read_parquet(folder / f"{name}.parquet") for name in ("truth", "train_meta"))
    for file in files:
        rows = meta[meta.batch_id == file].sort_values("first_pulse_index")
        if not len(rows): raise SystemExit(f"{folder} has no events of a file {file} in train_meta.parquet: name another file")
        pulses.append(pd.read_parquet(folder / "train" / f"batch_{file}.parquet").assign(event=n + np.repeat(np.arange(len(rows)), rows.last_pulse_index - rows.first_pulse_index + 1)))
        truths.append(rows[["batch_id", "event_id", "azimuth", "zenith"]].merge(truth, on=["batch_id", "event_id"], validate="one_to_one"))
        n += len(rows)
    return pd.concat(pulses, ignore_index=True), pd.concat(truths, ignore_index=True)


def thinned(rng, pulses, n, share, detector, settings):
    "Pulses of n events, as `read_out` gives them, with a share (n,) of their light, and which of them trigger; pulses: event (0 to n - 1), sensor_id, time, charge."
    event, sensor, time, charge = (pulses[c].to_numpy(t) for c, t in (("event", np.int64), ("sensor_id", np.int64), ("time", np.float64), ("charge", np.float64)))
    electrons = np.maximum(1, np.rint(charge)).astype(int)
    left = rng.binomial(electrons, share[event])
    last = np.zeros(n)
    np.maximum.at(last, event, time)
    dark = noise_hits(rng, detector, np.full(n, 6000. - MARGIN), last + MARGIN)
    back, some = rng.random(len(dark[0])) < 1 - share[dark[0]], left > 0
    dark = [x[back] for x in dark]
    hits = [np.concatenate(x) for x in zip((event[some], sensor[some], time[some]), dark)]
    return read_out(*hits, np.concatenate([(charge * left / electrons)[some], spe_charge(rng, np.ones(len(dark[0])))]), n, detector.neighbours, settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--files", type=lambda text: [int(x) for x in text.split(",")], metavar="1,2,3", required=True)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--least", type=float, default=0.25, help="share of the light that is left at least")
    parser.add_argument("--most", type=float, default=0.95)
    parser.add_argument("--held-out", type=int, default=10, help="one event of so many is left out")
    parser.add_argument("--mix", default="ppc", help="of the simulation, whose read-out triggers")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists(): parser.error(f"{args.out} is there already: choose another folder")
    if not 0 < args.least <= args.most <= 1: parser.error("--least and --most are shares, above 0 and at most 1, the first not the larger one")
    if args.held_out < 2 or args.copies < 1: parser.error("--held-out must be at least 2, --copies at least 1")
    (pulses, truth), geometry = read_events(args.data, args.files), load_geometry(args.data)
    recording = pulses.sensor_id.unique()
    detector = make_detector(geometry, np.setdiff1d(np.arange(len(geometry.xyz)), recording))
    settings, rng = SimulationSettings(mix=args.mix), np.random.default_rng(args.seed)
    events, start = np.flatnonzero(np.arange(len(truth)) % args.held_out != args.held_out - 1), np.searchsorted(pulses.event, np.arange(len(truth) + 1))
    making = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    (making / "train").mkdir(parents=True)
    metas, truths, n = [], [], 0
    for copy in range(1, args.copies + 1):
        parts, kept, first = [], [], n
        for some in tqdm(np.array_split(events, min(PARTS, len(events))), f"copy {copy} of {args.copies}", leave=False):
            share = np.exp(rng.uniform(np.log(args.least), np.log(args.most), len(some)))
            rows = np.concatenate([np.arange(start[e], start[e + 1]) for e in some])
            (event, *rest), triggered = thinned(rng, pulses.iloc[rows].assign(event=np.repeat(np.arange(len(some)), start[some + 1] - start[some])), len(some), share, detector, settings)
            number = np.cumsum(triggered) - 1
            parts.append(pulse_frame([number[event[triggered[event]]], *(x[triggered[event]] for x in rest)], n))
            kept.append(truth.iloc[some[triggered]].assign(light=share[triggered]))
            n += int(triggered.sum())
        these = pd.concat(kept, ignore_index=True)
        these = these.rename(columns={"batch_id": "source_file", "event_id": "source_event"}).assign(event_id=np.arange(first, n))
        metas.append(write_batch(making, copy, pd.concat(parts, ignore_index=True), these))
        truths.append(these.assign(batch_id=copy).drop(columns=["azimuth", "zenith"]))
        print(f"copy {copy}: {n - first:,} of {len(events):,} events trigger", flush=True)
    write_table(pd.concat(metas, ignore_index=True), making / "train_meta.parquet")
    write_table(pd.concat(truths, ignore_index=True), making / "truth.parquet")
    geometry.to_csv(making / "sensor_geometry.csv")
    making.rename(args.out)
