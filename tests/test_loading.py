"""Batches of a data set: every event once, in an order that the seed fixes, the same in worker processes."""
import sys

import numpy as np
import pytest
import torch

from iceaggr.data import IceCubeDataset
from iceaggr.engine.checkpoints import events_checksum
from iceaggr.engine.loading import EventBatchSampler, PackedBatches, held_out_events, sample_events
from iceaggr.model import ranges_of_events
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.testing import write_tiny


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading") / "data"
    return IceCubeDataset(simulate_dataset(folder, 600, events_per_file=200, progress=False))


def equal(one, other):
    "Are two packed batches the same, key by key?"
    if isinstance(one, dict): return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def test_sampler_draws_each_event_once(events):
    sampler = EventBatchSampler(events, 64, seed=1, max_pulses=20_000)
    first = list(sampler)
    assert len(first) == len(sampler)
    assert sorted(sum(first, [])) == list(range(len(events)))
    assert first == list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    assert sorted(sum(sampler, [])) == list(range(len(events)))


def test_sampler_leaves_out_what_is_held_out(events):
    sampler = EventBatchSampler(events, 64, seed=1, max_pulses=20_000, leave_out=10)
    held_out = set(held_out_events(events, 10))
    assert sorted(sum(sampler, [])) == sorted(set(range(len(events))) - held_out)
    assert len(list(sampler)) == len(sampler)
    last = held_out_events(events, 10, most=7)
    assert len(last) == 7 and set(last) < held_out


def test_batches_stay_within_the_budget_of_pulses(events):
    batches = list(EventBatchSampler(events, 64, seed=1, max_pulses=5_000))
    pulses = np.array([events.n_pulses[batch].sum() for batch in batches])
    single = np.array([len(batch) == 1 for batch in batches])
    assert ((pulses <= 5_000) | single).all()


@pytest.mark.parametrize("wrong", [dict(leave_out=1), dict(batch_size=0), dict(max_pulses=0)])
def test_sizes_that_make_no_batches_are_refused(events, wrong):
    with pytest.raises(ValueError, match="at least"): EventBatchSampler(events, **{"batch_size": 8, **wrong})


def test_a_window_that_decodes_again_and_again_is_warned_of(events):
    with pytest.warns(UserWarning, match="cache_size=2"): EventBatchSampler(events, 8, window=2)


def test_worker_processes_make_the_same_batches(events):
    lists = [range(64), [], range(len(events) - 1, len(events) - 100, -1)]
    batches = PackedBatches(events, lists)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=1)
    for chosen, here, there in zip(lists, batches, loader, strict=True):
        if not len(chosen): assert here is there is None
        else: assert equal(here, there) and equal(here, collate_dom_packing(events.__getitems__(chosen)))
    with pytest.raises(IndexError, match="batch 3 of 3"): batches[3]


def test_samples_read_few_files(tmp_path, monkeypatch):
    "However many there are: a start that reads all files of a large data set would take half an hour."
    root = write_tiny(tmp_path / "many", dict.fromkeys(range(1, 10), 7))
    ds, read, read_file = IceCubeDataset(root), [], IceCubeDataset._read_file
    def noted(self, f, progress):
        read.append(f)
        return read_file(self, f, progress)

    monkeypatch.setattr(IceCubeDataset, "_read_file", noted)
    assert sample_events(ds, 3).tolist() == [0, 3, 6, 28, 31, 34, 56, 59, 62]
    assert sample_events(ds, 99).tolist() == [*range(7), *range(28, 35), *range(56, 63)]
    for first_use in (events_checksum, ranges_of_events):
        read.clear()
        first_use(ds)
        assert set(read) <= {0, 4, 8}


@pytest.mark.skipif(sys.platform != "linux", reason="workers inherit the patch by a fork")
def test_full_shared_memory_ends_the_run(events, monkeypatch):
    "An error in the thread that sends batches would lose one, and the receiver would wait for ever."
    def full(*_): raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    batches = PackedBatches(events, [range(64)] * 3)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=2, timeout=60,
                                         multiprocessing_context="fork")
    with pytest.raises(OSError, match="/dev/shm has .* MB free.*--workers 0"): list(loader)


def test_a_share_takes_part_of_each_batch(events):
    def smallest_three(n_pulses): return np.argsort(n_pulses, kind="stable")[:3]
    batches = PackedBatches(events, [range(64), []], share=smallest_three)
    chosen = sorted(range(64), key=lambda i: int(events.n_pulses[i]))[:3]
    assert equal(batches[0], collate_dom_packing(events.__getitems__(chosen)))
    assert batches[1] is None
    assert PackedBatches(events, [range(64)], share=lambda n_pulses: [])[0] is None
