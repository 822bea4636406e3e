"""Thousands of batches from either form: memory and open files stay as they are."""
import gc
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")

SCRIPT = """
import gc, json, os, sys, warnings
from pathlib import Path
import numpy as np
from iceaggr.benchmark import resident_memory
from iceaggr.data import IceCubeDataset
from iceaggr.engine.loading import EventBatchSampler
from iceaggr.engine.prepare import prepare
from iceaggr.testing import write_tiny
from iceaggr.engine.loading import PackedBatches
folder, form, batches = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
root = write_tiny(folder / "data", {b: 200 for b in range(1, 9)})
if form == "prepared": root = prepare(root, folder / "prepared", progress=False)
ds = IceCubeDataset(root, cache_size=2)                 # two of eight Parquet files: decoded over and over
sampler, done, seen = EventBatchSampler(ds, 16), 0, []
def look():
    gc.collect()
    seen.append((done, resident_memory(), len(os.listdir("/proc/self/fd")), len(ds._open)))
def some(n):
    global done
    stop = done + n
    while True:
        sampler.set_epoch(done)
        packed = PackedBatches(ds, list(sampler), 64)
        for k in range(len(packed)):
            assert len(packed[k]["metadata"]["event_ids"])
            done += 1
            if done == stop: return
some(batches // 5); look()                                      # the allocator has found its level
for _ in range(4): some(batches // 5); look()
print(json.dumps(seen))
"""


@pytest.mark.parametrize("form", ["parquet", "prepared"])
@pytest.mark.parametrize("batches, growth", [(500, 8e6), pytest.param(10_000, 8e6, marks=pytest.mark.slow)])
def test_reading_does_not_grow(tmp_path, form, batches, growth):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), form, str(batches)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    print(form, [(n, f"{rss / 1e6:.1f} MB", files, held) for n, rss, files, held in seen])
    assert seen[-1][0] == batches
    assert seen[-1][1] - seen[0][1] < growth, seen                      # bytes
    assert len({files for _, _, files, _ in seen}) == 1 and seen[-1][2] < 50, seen
    assert {held for *_, held in seen} <= ({1, 2} if form == "parquet" else {8})


def test_prepared_files_that_stay_open_are_bounded(tmp_path, monkeypatch):
    "However many files there are: three descriptors for each of those that are held, or fewer."
    import iceaggr.data as data
    from iceaggr.engine.prepare import prepare
    from iceaggr.testing import write_tiny

    root = prepare(
        write_tiny(tmp_path / "data", {b: 2 for b in range(1, 31)}),
        tmp_path / "prepared",
        progress=False,
    )
    monkeypatch.setattr(data, "MAPPED_FILES", 5)
    gc.collect()
    before, most = len(os.listdir("/proc/self/fd")), 0
    ds = data.IceCubeDataset(root)
    for _ in range(3):
        for i in range(len(ds)):
            ds[i]
            most = max(most, len(os.listdir("/proc/self/fd")))
    assert most - before <= 3 * 5 and len(ds._open) == 5
    del ds
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_every_parquet_file_is_closed_again(tmp_path):
    import iceaggr.data as data
    from iceaggr.testing import write_tiny
    root = write_tiny(tmp_path, {b: 2 for b in range(1, 31)})
    before = len(os.listdir("/proc/self/fd"))
    for options in (dict(), dict(on_bad_event="skip")):
        ds = data.IceCubeDataset(root, **options)
        assert len(list(ds)) == 60
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before + 1
