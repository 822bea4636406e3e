"""Pulses by event and DOM: the order, the reference time of an event, and blocks of any size."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import iceaggr.pulses
from iceaggr.pulses import PulseBlocks, _by_event_and_time, dom_order, event_time_reference

sensors_of_events = st.lists(
    st.lists(st.integers(0, 5159), min_size=1, max_size=40), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(sensors_of_events, st.integers(0, 2**40))
def test_order_by_event_and_dom(sensors, first_event):
    event = first_event + np.repeat(np.arange(len(sensors)), [len(s) for s in sensors])
    sensor = np.concatenate(sensors)
    order, start = dom_order(event, sensor)
    assert np.array_equal(order, np.lexsort((np.arange(len(event)), sensor, event)))     # stable
    sizes = pd.DataFrame({"event": event, "sensor": sensor}).groupby(["event", "sensor"]).size()
    assert start.tolist() == (sizes.cumsum() - sizes).tolist()


def test_too_much_for_one_sort_is_refused():
    with pytest.raises(ValueError, match="pack fewer events"):
        dom_order(np.array([0, 2**40]), np.array([2**24, 1]))


def reference_by_hand(time, charge, event, n_events):
    "Event by event: the first time at which half of the charge has come, in whole thousandths of a p.e."
    out = []
    for e in range(n_events):
        k = np.flatnonzero(event == e)
        k = k[np.argsort(time[k], kind="stable")]
        weight = np.clip(np.round(charge[k].astype(np.float64) * 1000), 1, 2.0**40).astype(np.int64)
        half = np.searchsorted(np.cumsum(weight), (weight.sum() + 1) // 2)
        out.append(time[k][half] if len(k) else 0)
    return np.array(out, time.dtype)


times = st.one_of(
    st.integers(5_000, 80_000),
    st.integers(-50, 50).map(float),
    st.floats(-2.0**100, 2.0**100, width=32),
    st.just(-0.0),
)
charges = st.floats(np.float32(0.001), 3_000, width=32, exclude_min=True)
some_doms = st.lists(st.tuples(times, charges, st.integers(0, 5)), max_size=60)     # time, charge, event


def columns_of(doms):
    return tuple(np.array([dom[i] for dom in doms], kind)
                 for i, kind in enumerate((np.float32, np.float32, np.int64)))


@settings(max_examples=200, deadline=None)
@given(some_doms, st.integers(0, 6), st.sampled_from([6, 7]))
def test_reference_time_of_an_event(doms, seed, n_events):
    "Any times, ties, events in any order."
    time, charge, event = columns_of(doms)
    mixed = np.random.default_rng(seed).permutation(len(doms))
    t, q, e = (torch.from_numpy(values[mixed]) for values in (time, charge, event))
    found = event_time_reference(t, q, e, n_events)
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy()[:6], reference_by_hand(time, charge, event, 6))
    finer = t.double() + torch.rand(len(t), dtype=torch.float64) * 1e-9     # they differ, but not as float32
    found = event_time_reference(finer, q, e, n_events).numpy()[:6]
    assert np.array_equal(found, reference_by_hand(finer.numpy(), q.numpy(), e.numpy(), 6))


@settings(max_examples=100, deadline=None)
@given(some_doms)
def test_order_by_time_where_the_key_is_too_long(doms):
    "Event, time and number do not fit into 63 bits, so two sorts replace the one."
    time, _, event = columns_of(doms)
    if not len(doms): return
    order = _by_event_and_time(torch.from_numpy(time), torch.from_numpy(event), 2**50).numpy()
    assert np.array_equal(time[order], time[np.lexsort((time, event))])
    assert np.array_equal(event[order], np.sort(event))


a_pulse = st.tuples(st.integers(0, 30), st.integers(0, 5))     # time, sensor
some_events = st.lists(st.lists(a_pulse, min_size=1, max_size=15), min_size=1, max_size=8)


def sorted_in_pieces(n, columns, order, piece, block):
    "Pulses that come in pieces of a size, sorted in blocks of a size."
    keep, iceaggr.pulses.BLOCK_PULSES = iceaggr.pulses.BLOCK_PULSES, block
    try:
        blocks = PulseBlocks(n)
        for i in range(0, n.sum(), piece): blocks.add({k: v[i:i + piece] for k, v in columns.items()})
    finally: iceaggr.pulses.BLOCK_PULSES = keep
    return blocks.finish(order)


def equal_columns(a, b): return all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)


@settings(max_examples=50, deadline=None)
@given(some_events, st.integers(1, 40), st.integers(1, 40), st.randoms())
def test_blocks_and_pieces_of_any_size(events, piece, block, random):
    "The tables do not depend on how the pulses come in, and hold every event as it was."
    n, flat = np.array([len(e) for e in events]), np.array(sum(events, []))
    charge = np.arange(1, len(flat) + 1) * np.float32(0.1)
    columns = {"time": flat[:, 0], "sensor_id": flat[:, 1], "charge": charge}
    columns["auxiliary"] = flat[:, 0] % 2 == 0
    order = np.array(random.sample(range(len(n)), len(n)))
    a = sorted_in_pieces(n, columns, order, piece, block)
    b = sorted_in_pieces(n, columns, order, 10**6, 10**6)
    assert equal_columns(a.columns, b.columns) and equal_columns(a.doms, b.doms)
    assert equal_columns(a.events, b.events)
    names = ("time", "charge", "sensor_id", "auxiliary")
    source = np.stack([columns[k].astype(np.float32) for k in names], 1)
    for k, pulses in enumerate(np.split(source, np.cumsum(n)[:-1])):     # the k-th to come is event order[k]
        found = a.gather(np.array([order[k]]))
        assert np.array_equal(found, pulses[np.argsort(pulses[:, 0], kind="stable")])
