"""Batches of events: every event once, in an order that the seed fixes, from a few files at a time."""
import subprocess
import sys

import numpy as np
import pytest

from iceaggr.data import IceCubeDataset
from iceaggr.engine.loading import EventBatchSampler
from iceaggr.testing import write_tiny


@pytest.fixture
def many(tmp_path):
    "Seven files of 31 to 37 events."
    return IceCubeDataset(write_tiny(tmp_path, {b: 30 + b for b in range(1, 8)}), cache_size=2)


def batches_of(dataset, seed=1, **options): return list(EventBatchSampler(dataset, 8, seed=seed, **options))


@pytest.mark.parametrize("options", [
    {},
    {"window": 1},
    {"window": 2, "chunk": 3},
    {"max_pulses": 60},
    {"like_size": False},
    {"shuffle": False},
    {"shuffle": False, "like_size": True},
    {"shuffle": False, "max_pulses": 30},
])
def test_every_event_comes_once_in_each_epoch(many, options):
    sampler, shuffle = EventBatchSampler(many, 8, seed=1, **options), options.get("shuffle", True)
    most = options.get("max_pulses")
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and max(map(len, batches)) <= 8
        assert sorted(sum(batches, [])) == list(range(len(many)))
        if epoch == 0: assert batches == batches_of(many, **options)
        if most: assert all(many.n_pulses[b].sum() <= most or len(b) == 1 for b in batches)
        if not shuffle and not options.get("like_size"): assert sum(batches, []) == list(range(len(many)))
    if shuffle:
        assert batches != batches_of(many, **options)     # of the first epoch
        assert batches != batches_of(many, seed=2, **options)


@pytest.mark.parametrize("window", [1, 2])
def test_windows_of_files_never_mix(many, window):
    used = []
    for batch in EventBatchSampler(many, 8, window=window):
        for f in np.unique(many.file_of(np.array(batch))):
            if f not in used: used.append(int(f))
            assert used.index(f) >= (len(used) - 1) // window * window     # no return to an earlier window
    assert sorted(used) == list(range(7)) and used != sorted(used)


def test_options_that_cannot_work(many):
    with pytest.warns(UserWarning, match="cache_size=3"): EventBatchSampler(many, 8, window=3)
    for wrong in ({"batch_size": 0}, {"batch_size": 2, "max_pulses": 0}):
        with pytest.raises(ValueError, match="at least 1"): EventBatchSampler(many, **wrong)


def test_events_of_similar_size_come_together(many):
    def spread(**options):
        batches = EventBatchSampler(many, 8, **options)
        return np.mean([np.ptp(many.n_pulses[batch]) for batch in batches])

    assert spread() < spread(like_size=False) / 3


OTHER_PROCESS = """
import sys
from iceaggr.data import IceCubeDataset
from iceaggr.engine.loading import EventBatchSampler
sampler = EventBatchSampler(IceCubeDataset(sys.argv[1], cache_size=2), 8, seed=5)
sampler.set_epoch(3)
print(list(sampler))
"""


def test_the_order_is_the_same_in_another_process(many):
    sampler = EventBatchSampler(many, 8, seed=5)
    sampler.set_epoch(3)
    argv = [sys.executable, "-c", OTHER_PROCESS, str(many.root)]
    found = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(list(sampler))
