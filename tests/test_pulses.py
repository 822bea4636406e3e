"""Order of pulses, times of any clock, reference times and the tables of a file."""
import numpy as np
import pandas as pd
import pytest
import torch

from iceaggr.pulses import MAX_TIME, PulseBlocks, count_times, cut_batches, event_time_reference

WHEN, EVENT = np.array([7, 12_000, 3, MAX_TIME - 1, 5]), np.array([0, 0, 1, 1, 1])
SINCE_1970 = 1_764_300_000_000_000_000


@pytest.mark.parametrize("clock", [0, 10 ** 12, SINCE_1970])
def test_any_clock(clock):
    "Whole numbers of any size count from the first pulse of their event, those of a usual clock stay."
    for time in (WHEN + clock, pd.Series(WHEN + clock, dtype="Int64")):
        first = np.repeat([-7, -3], [2, 3]) * (clock > 0)
        assert np.array_equal(count_times(time, EVENT) - WHEN, first)


def test_only_late_events_are_counted_anew():
    as_float = count_times((WHEN + 10 ** 12).astype(float), EVENT)
    assert np.array_equal(as_float, count_times(WHEN + 10 ** 12, EVENT))
    mixed = np.array([5, 9]) + SINCE_1970 * np.array([0, 1])
    assert count_times(mixed, np.array([0, 1])).tolist() == [5, 0]
    assert count_times(np.array([-2 * MAX_TIME, 4 - 2 * MAX_TIME])).tolist() == [0, 4]
    assert len(count_times(WHEN[:0])) == 0


def test_floats_that_lost_their_nanoseconds():
    with pytest.raises(ValueError, match="known to 256 ns"): count_times(np.array([0., SINCE_1970]))
    assert np.isnan(count_times(np.array([0., np.nan]))[1])


def test_reference_time():
    "Of any order of the DOMs and any zero of the clock; 0 for an event without DOMs."
    time = torch.tensor([10_300., 10_100., 9_000., 10_200., 55_000., 10_150.])
    charge, event = torch.tensor([4.025, 2.5, 1., 9.975, 1., 0.1]), torch.tensor([0, 0, 0, 0, 1, 0])
    found = event_time_reference(time, charge, event, 3)
    assert found.tolist() == [10_200., 55_000., 0.]
    order = torch.tensor([3, 5, 0, 4, 1, 2])
    assert torch.equal(event_time_reference(time[order], charge[order], event[order], 3), found)
    assert torch.equal(event_time_reference(time - 10_200, charge, event, 2), found[:2] - 10_200)


def test_batches_of_events():
    assert cut_batches([3, 3, 3, 20, 1, 1], 2) == [(0, 2), (2, 4), (4, 6)]
    assert cut_batches([3, 3, 3, 20, 1, 1], 4, max_pulses=9) == [(0, 3), (3, 4), (4, 6)]


def test_events_that_come_in_pieces():
    "Two pieces, the second event in both."
    columns = dict(time=[10, 20, 5, 6, 7], charge=[1, 2, 3, 4, 5], sensor_id=[9, 8, 7, 5, 7],
                   auxiliary=[1, 0, 0, 0, 1])
    blocks = PulseBlocks(np.array([2, 3]))
    for piece in (slice(0, 3), slice(3, 5)): blocks.add({k: np.array(v)[piece] for k, v in columns.items()})
    pulses = blocks.finish(np.arange(2))
    by_time = pulses.gather(np.array([1, 0]))[:, [0, 2]].tolist()
    assert by_time == [[5, 7], [6, 5], [7, 7], [10, 9], [20, 8]]
    assert pulses.doms["sensor_id"].tolist() == [8, 9, 5, 7]
    assert pulses.doms["n_pulses"].tolist() == [1, 1, 1, 2]
    assert pulses.events["event_time"].tolist() == [20, 5]
    assert pulses.hits(np.array([1]))["doms"]["first_pulse"].tolist() == [2, 3]
