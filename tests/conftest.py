"""Fixtures for all tests: a tiny data set made by hand, and the real-physics events where they are at hand."""
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


def write_tiny(root, batches={2: 8, 3: 6, 10: 7}, split="train", seed=0):
    "A data set in the Kaggle layout: so many events a batch file, of 3 to 40 pulses."
    rng, metas, root = np.random.default_rng(seed), [], Path(root)
    (root / split).mkdir(parents=True, exist_ok=True)
    for batch, k in batches.items():
        n, ids = rng.integers(3, 41, k), 1000 * batch + 3 * np.arange(k)
        event = np.repeat(ids, n)
        pulses = pd.DataFrame(dict(event_id=event, sensor_id=rng.integers(0, 200, len(event)).astype(np.int16) * 25, time=rng.integers(8_000, 14_000, len(event)),
                                   charge=rng.integers(1, 80, len(event)) * 0.025, auxiliary=rng.random(len(event)) < 0.4))
        pulses.sort_values(["event_id", "time"], kind="stable").set_index("event_id").to_parquet(root / split / f"batch_{batch}.parquet")
        last = np.cumsum(n) - 1
        metas.append(pd.DataFrame(dict(batch_id=batch, event_id=ids, first_pulse_index=last - n + 1, last_pulse_index=last,
                                       azimuth=rng.uniform(0, 2 * np.pi, k), zenith=np.arccos(rng.uniform(-1, 1, k)))))
    meta = pd.concat(metas, ignore_index=True)
    (meta if split == "train" else meta.drop(columns=["azimuth", "zenith"])).to_parquet(root / f"{split}_meta.parquet", index=False)
    return root


@pytest.fixture
def tiny_dataset(tmp_path):
    "Folder of a data set with training files 2, 3 and 10 of 8, 6 and 7 events."
    return write_tiny(tmp_path / "tiny")


@pytest.fixture(scope="session")
def ppc_root():
    "Folder of the real-physics events."
    root = os.environ.get("ICEAGGR_PPC")
    if not root: pytest.skip("ICEAGGR_PPC is not set: no real-physics events to test on")
    return Path(root)
