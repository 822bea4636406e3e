"""Put files of several data sets with truth, of the same detector, into one: to fine-tune on two kinds of events at once.

    python data_scripts/join_datasets.py OUT DIR:8:30000 DIR2:1 DIR2:2 [...]

Each DIR:FILE names a file of a data set, with :N its first N events. In OUT they have the numbers 101, 102 and so on, in the order given, and their events new ids from 0 on."""
import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from iceaggr.geometry import load_geometry
from iceaggr.simulation import write_batch, write_table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", metavar="DIR:FILE[:N]")
    args = parser.parse_args()
    if args.out.exists(): parser.error(f"{args.out} is there already: choose another folder")
    parts = [(Path(folder), int(number), int(most[0]) if most else None) for folder, number, *most in (text.split(":") for text in args.files)]
    geometry = load_geometry(parts[0][0])
    for folder, *_ in parts:
        if not np.allclose(load_geometry(folder).xyz, geometry.xyz, atol=0.01): parser.error(f"{folder} is of another detector than {parts[0][0]}")
    making = args.out.with_name(f".{args.out.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    (making / "train").mkdir(parents=True)
    metas, truths, n = [], [], 0
    for number, (folder, batch, most) in enumerate(parts, 101):
        meta = pd.read_parquet(folder / "train_meta.parquet").query("batch_id == @batch").sort_values("first_pulse_index")[:most]
        if not len(meta): parser.error(f"{folder} has no events of a file {batch} in train_meta.parquet: name another file")
        truth = meta[["batch_id", "event_id", "azimuth", "zenith"]].merge(pd.read_parquet(folder / "truth.parquet"), on=["batch_id", "event_id"], validate="one_to_one")
        pulses = pd.read_parquet(folder / "train" / f"batch_{batch}.parquet").reset_index(drop=True)[:meta.last_pulse_index.iloc[-1] + 1]
        ids = n + np.arange(len(meta))
        pulses.insert(0, "event_id", np.repeat(ids, meta.last_pulse_index - meta.first_pulse_index + 1))
        metas.append(write_batch(making, number, pulses, truth.assign(event_id=ids)))
        truths.append(truth.assign(event_id=ids, batch_id=number).drop(columns=["azimuth", "zenith"]))
        print(f"{number}: {len(ids):,} events of {folder}, file {batch}", flush=True)
        n += len(ids)
    write_table(pd.concat(metas, ignore_index=True), making / "train_meta.parquet")
    write_table(pd.concat(truths, ignore_index=True), making / "truth.parquet")
    geometry.to_csv(making / "sensor_geometry.csv")
    making.rename(args.out)
