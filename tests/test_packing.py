"""Packing, cutting and the paths of T1 for arbitrary events."""
import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iceaggr.accumulator import EventAccumulator
from iceaggr.data import IceCubeDataset
from iceaggr.dom_transformer import DOMTransformer
from iceaggr.engine.distributed import balanced_share
from iceaggr.engine.loading import EventBatchSampler, PackedBatches, packed_batch
from iceaggr.engine.prepare import prepare
from iceaggr.packing import collate_dom_packing, pack_lengths, reference_collate, split_batch
from iceaggr.testing import write_tiny

# An event: pulses on a few sensors, some of them many times, in any order of time.
event = st.lists(st.tuples(st.integers(0, 5159), st.integers(1, 70)), min_size=1, max_size=6)
batches = st.lists(event, min_size=1, max_size=5)


def make(doms, event_id):
    sensor = torch.cat([torch.full((n,), float(s)) for s, n in doms])
    g = torch.Generator().manual_seed(event_id)
    time = torch.randint(0, 80_000, sensor.shape, generator=g).float()
    charge = torch.randint(1, 4_000, sensor.shape, generator=g) * 0.025
    aux = torch.randint(0, 2, sensor.shape, generator=g).float()
    return dict(
        pulse_features=torch.stack([time, charge, sensor, aux], 1),
        event_id=torch.tensor(event_id),
        n_pulses=torch.tensor(len(sensor)),
    )


def rows(x):
    return sorted(map(tuple, x.tolist()))


@settings(max_examples=60, deadline=None)
@given(batches, st.sampled_from([1, 3, 16, 64, "auto"]))
def test_every_pulse_is_in_exactly_one_place(doms, L):
    events = [make(d, i + 1) for i, d in enumerate(doms)]
    batch = collate_dom_packing(events, L)
    m, mask = batch["metadata"], batch["dom_mask"]
    flat, dom = batch["packed_sequences"][mask], m["global_dom_ids"][mask]
    for i, e in enumerate(events):
        assert rows(flat[m["dom_to_event_idx"][dom] == i]) == rows(e["pulse_features"])
    assert torch.equal(m["sensor_ids"][dom], flat[:, 2].long())
    assert (batch["packed_sequences"][~mask] == 0).all() and ((m["global_dom_ids"] < 0) == ~mask).all()
    sizes = torch.bincount(dom, minlength=m["total_doms"])
    assert torch.equal(sizes, m["dom_features"][:, 2].long())
    pulses = batch["packed_sequences"].view(-1, 4)[m["pulse_positions"]]
    owner = torch.repeat_interleave(torch.arange(m["total_doms"]), m["dom_pulse_counts"])
    assert torch.equal(m["global_dom_ids"].view(-1)[m["pulse_positions"]], owner)
    assert (pulses[:, 0].diff() >= 0)[
        owner.diff() == 0
    ].all()  # the order of time, also from chunk to chunk
    for d in range(m["total_doms"]):  # a DOM that fits lies in one sequence, in the order of time
        where = (m["global_dom_ids"] == d).nonzero()
        if sizes[d] <= batch["packed_sequences"].shape[1]:
            assert len(where[:, 0].unique()) == 1
            assert (batch["packed_sequences"][where[:, 0], where[:, 1], 0].diff() >= 0).all()


@settings(max_examples=25, deadline=None)
@given(batches, st.sampled_from([4, 32]), st.integers(1, 4))
def test_parts_and_paths_agree(doms, L, max_sequences):
    events = [make(d, i + 1) for i, d in enumerate(doms)]
    batch = collate_dom_packing(events, L)
    torch.manual_seed(0)
    t1 = DOMTransformer(32, 2, 1).eval()
    with torch.no_grad():
        expected, m = t1(batch)
        for t1.kernel in ("dense", "flex"): assert torch.allclose(t1(batch)[0], expected, atol=1e-5)
        t1.kernel = "auto"
        accumulator, found = EventAccumulator(), {}
        for part in split_batch(batch, max_sequences):
            accumulator.add_batch(*t1(part))
            for t2 in accumulator.get_complete_events(batch_size=2):
                for n, i in enumerate(t2["event_ids"].tolist()):
                    assert i not in found
                    found[i] = t2["dom_embeddings"][t2["dom_to_event_idx"] == n]
    assert not accumulator.incomplete()
    for n, i in enumerate(m["event_ids"].tolist()):
        assert torch.allclose(found[i], expected[m["dom_to_event_idx"] == n], atol=1e-5)


def same(a, b):
    "Two batches, key by key, to the bit and in type."
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a: same(a[k], b[k])
    elif isinstance(a, torch.Tensor): assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else: assert type(a) is type(b) and a == b


def plain_batch(events, L):
    "The tables of a batch worked out by pandas: pulses by (event, sensor, time), and one row a DOM."
    frame = pd.concat(
        [
            pd.DataFrame(
                e["pulse_features"].double().numpy(), columns=["time", "charge", "sensor", "aux"]
            ).assign(event=i)
            for i, e in enumerate(events)
        ]
    )
    frame = frame.sort_values(["event", "sensor", "time"], kind="stable")
    doms = (
        frame.groupby(["event", "sensor"])
        .agg(time=("time", "min"), charge=("charge", "sum"), n=("time", "size"))
        .reset_index()
    )
    return frame, doms


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    "A data set of four files in the Kaggle layout, with ties in time, and its prepared form."
    root = write_tiny(tmp_path_factory.mktemp("forms") / "kaggle", {1: 40, 2: 25, 7: 30, 12: 1}, seed=4)
    for path in (root / "train").iterdir():
        table = pd.read_parquet(path)
        table.assign(
            time=table.time // 300 * 300, sensor_id=(table.sensor_id % 7).astype(np.int16)
        ).to_parquet(path)  # many pulses a DOM
    return IceCubeDataset(root, cache_size=4), IceCubeDataset(
        prepare(root, root.parent / "prepared", progress=False)
    )


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(-96, 95), min_size=1, max_size=40, unique_by=lambda i: i % 96),
    st.sampled_from([1, 5, 64, 512, "auto"]),
    st.booleans(),
)
def test_all_ways_give_the_same_batch(forms, indices, L, as_array):
    "From Parquet, from prepared files, from events one by one: several files, any order."
    parquet, prepared = forms
    events = parquet.__getitems__(indices)
    expected = collate_dom_packing(events, L)
    given = np.array(indices) if as_array else indices
    for ds in forms: same(packed_batch(ds, given, L), expected)
    frame, doms = plain_batch(events, L)                                                # and they are right
    m = expected["metadata"]
    assert torch.equal(
        expected["packed_sequences"].view(-1, 4)[m["pulse_positions"]],
        torch.tensor(frame[["time", "charge", "sensor", "aux"]].to_numpy(np.float32)),
    )
    assert (
        m["sensor_ids"].tolist() == doms.sensor.tolist()
        and m["dom_to_event_idx"].tolist() == doms.event.tolist()
        and m["dom_pulse_counts"].tolist() == doms.n.tolist()
    )
    assert torch.equal(m["dom_features"], torch.tensor(doms[["time", "charge", "n"]].to_numpy(np.float32)))
    assert torch.equal(m["event_dom_counts"], torch.bincount(m["dom_to_event_idx"])) and m[
        "event_ids"
    ].tolist() == [int(e["event_id"]) for e in events]
    assert torch.equal(m["targets"], torch.stack([e["target"] for e in events]))


def test_parts_of_a_data_set_and_the_test_split(forms, tmp_path):
    some = forms[0].event_ids[[3, 50, 51, 90]]
    a, b = (IceCubeDataset(ds.root, events=some, cache_size=3) for ds in forms)
    same(packed_batch(b, range(4)), packed_batch(a, range(4)))
    same(packed_batch(b, range(4)), packed_batch(forms[1], [3, 50, 51, 90]))
    root = write_tiny(tmp_path / "test", {661: 5}, split="test")
    ds = IceCubeDataset(prepare(root, tmp_path / "out", split="test", progress=False), "test")
    batch = packed_batch(ds, [4, 2])
    assert batch["metadata"]["targets"] is None
    same(batch, collate_dom_packing(IceCubeDataset(root, "test").__getitems__([4, 2])))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_gives_the_batches(forms, method):
    for ds in forms:
        share = partial(balanced_share, rank=1, world_size=3)
        whole = list(EventBatchSampler(ds, 16, seed=1)) + [[], [5]]
        lists = [[b[i] for i in share(ds.n_pulses[b])] for b in whole]
        batches = PackedBatches(ds, whole, 64, share=share)
        batches[0]  # files are open when the workers start
        assert len(batches) == len(lists) and batches[-1] is None and len(pickle.dumps(batches)) < 20_000
        loader = torch.utils.data.DataLoader(
            batches, batch_size=None, num_workers=2, multiprocessing_context=method
        )
        for some, batch in zip(lists, loader, strict=True):
            if not some:
                assert batch is None
                continue
            same(batch, collate_dom_packing(ds.__getitems__(some), 64))
            batch["packed_sequences"] += 1  # of its own memory, as any tensor
        for k in (len(lists), -len(lists) - 1):
            with pytest.raises(IndexError, match="batch"): batches[k]
    assert len(PackedBatches(forms[1], [])) == 0


def test_what_cannot_be_packed(forms):
    for ds in forms:
        for indices, L, error, words in (
            ([], 512, ValueError, "no events"),
            ([3, 4, 3], 512, ValueError, "twice"),
            ([3, 3 - 96], 512, ValueError, "twice"),
            ([96], 512, IndexError, "event 96 of a data set of 96"),
            ([-97], 512, IndexError, "-97"),
            ([0], 0, ValueError, "max_seq_len"),
            ([0], "long", ValueError, "max_seq_len"),
        ):
            with pytest.raises(error, match=words): packed_batch(ds, indices, L)
        with pytest.raises(TypeError): packed_batch(ds, [1.0])
        with pytest.raises(TypeError): packed_batch(ds, np.array([1.0]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 70))
def test_first_fit_decreasing(lengths, capacity):
    used = []
    for n in sorted(lengths, reverse=True):                                               # the textbook's way
        room = [k for k, u in enumerate(used) if u + n <= capacity]
        if room: used[room[0]] += n
        else: used.append(n)
    piece, size, per_sequence = pack_lengths(np.array(lengths, int), capacity)
    real, sequence = piece < len(lengths), np.repeat(np.arange(len(per_sequence)), per_sequence)
    assert sorted(piece[real]) == list(range(len(lengths))) and size[real].tolist() == [
        lengths[p] for p in piece[real]
    ]
    assert np.bincount(sequence[real], size[real], len(used)).tolist() == used and np.bincount(
        sequence, size, len(used)
    ).tolist() == [capacity] * len(used)
    last = np.append(sequence[1:] != sequence[:-1], True) if len(piece) else np.zeros(0, bool)
    assert last[~real].all()  # a gap is at the end of its sequence
    for wrong in ([0], [capacity + 1]):
        with pytest.raises(ValueError, match="capacity"): pack_lengths(np.array(lengths + wrong), capacity)


def test_real_physics_batches(ppc_root, tmp_path):
    a = IceCubeDataset(ppc_root, batch_ids=[3, 4], cache_size=2)
    b = IceCubeDataset(prepare(ppc_root, tmp_path, [3, 4], progress=False))
    n = a.n_pulses
    order = np.random.default_rng(0).permutation(len(a))[:512]
    brightest = np.argsort(n)[-3:]
    for indices in (range(128), order[:128], np.union1d(order[128:256], brightest)):
        batch = packed_batch(b, indices)
        same(batch, packed_batch(a, indices))
        same(batch, collate_dom_packing(a.__getitems__(indices)))
        assert len(batch["packed_sequences"]) <= -(-int(n[np.asarray(indices)].sum()) // 512) + 1


def test_loop_and_vectorised_form_hold_the_same_pulses(ppc_root):
    "The loop over DOMs defines packing: the same DOMs, with the same pulses."
    ds = IceCubeDataset(ppc_root, batch_ids=[3], max_events=48)
    events = ds.__getitems__(range(48))
    for length in (16, 512):
        a, b = collate_dom_packing(events, length), reference_collate(events, length)
        for key in (
            "dom_to_event_idx",
            "sensor_ids",
            "event_ids",
            "event_dom_counts",
            "targets",
            "total_doms",
        ):
            same(a["metadata"][key], b["metadata"][key])
        for batch in (a, b):
            mask, dom = batch["dom_mask"], batch["metadata"]["global_dom_ids"]
            assert mask.sum() == sum(int(e["n_pulses"]) for e in events)
            batch["rows"] = rows(torch.cat([dom[mask][:, None], batch["packed_sequences"][mask]], 1))
        assert a["rows"] == b["rows"]


@pytest.mark.parametrize("length", [1, 8, 16, 512, "auto"])
def test_single_pulses_and_long_doms(length):
    "DOMs of 1, of a full sequence and of several sequences; sensors at both ends of the numbering."
    events = [make([(5, 1)], 7), make([(5, 33), (9, 1), (5159, 8)], 3), make([(2, 100), (3, 16)], 9)]
    batch = collate_dom_packing(events, length)
    if length == "auto": assert batch["packed_sequences"].shape[1] == 128
    pulses = batch["packed_sequences"].view(-1, 4)[batch["metadata"]["pulse_positions"]]
    assert rows(pulses) == rows(torch.cat([e["pulse_features"] for e in events]))
    shuffled = [dict(e, pulse_features=e["pulse_features"].flip(0)) for e in events]
    assert rows(collate_dom_packing(shuffled, length)["packed_sequences"].view(-1, 4)) == \
        rows(batch["packed_sequences"].view(-1, 4))


def test_events_that_cannot_be_packed():
    "The message names the event and what is wrong with it."
    event = make([(5, 1)], 7)
    for bad, words in (([], "empty"), ([dict(event, pulse_features=torch.zeros(0, 4))], "7 has no pulses"),
                       ([event, event], "twice"),
                       ([dict(event, pulse_features=torch.tensor([[np.nan, 1, 1, 0]]))], "event 7")):
        with pytest.raises(ValueError, match=words): collate_dom_packing(bad)


def test_hardly_a_cell_is_padding(ppc_root):
    "At most one sequence more than the pulses fill; all but the last two are at least 99 % full."
    ds = IceCubeDataset(ppc_root, batch_ids=[1], max_events=1_000)
    for start in range(0, len(ds) - 127, 128):
        mask = collate_dom_packing(ds.__getitems__(range(start, start + 128)))["dom_mask"]
        full = mask.float().mean(1).sort(descending=True).values
        assert len(full) <= -(-int(mask.sum()) // 512) + 1
        assert (full[:-2] >= 0.99).all()


@pytest.mark.parametrize("length, most", [(512, 4), (64, 1), (16, 3)])
def test_parts_hold_the_whole_batch(ppc_root, length, most):
    "Nothing is lost or moved between parts; a batch without the keys that packing adds is cut alike."
    whole = collate_dom_packing(IceCubeDataset(ppc_root, batch_ids=[1], max_events=40), length)
    m, parts = whole["metadata"], list(split_batch(whole, most))
    assert all(len(p["packed_sequences"]) <= most or p["metadata"]["total_doms"] == 1 for p in parts)
    for key in ("sensor_ids", "dom_features", "dom_pulse_counts"):
        same(torch.cat([p["metadata"][key] for p in parts]), m[key])
    for key in ("event_ids", "event_dom_counts", "event_times"):
        found = torch.cat([p["metadata"][key][p["metadata"]["dom_to_event_idx"]] for p in parts])
        same(found, m[key][m["dom_to_event_idx"]])
    pulses = [p["packed_sequences"].view(-1, 4)[p["metadata"]["pulse_positions"]] for p in parts]
    same(torch.cat(pulses), whole["packed_sequences"].view(-1, 4)[m["pulse_positions"]])
    keys = ("global_dom_ids", "total_doms", "dom_to_event_idx", "sensor_ids", "event_ids", "targets",
            "event_dom_counts", "dom_features")
    plain = dict(whole, metadata={k: m[k] for k in keys})
    for a, b in zip(split_batch(plain, most), parts, strict=True):
        same(a["packed_sequences"], b["packed_sequences"])
        same(a["metadata"]["event_times"], b["metadata"]["event_times"])


def test_a_single_event_is_refused():
    "A dictionary is iterable, too: its keys would be taken for events."
    event = {"pulse_features": torch.ones(3, 4), "event_id": torch.tensor(1)}
    with pytest.raises(TypeError, match=r"give a list, \[event\]"): collate_dom_packing(event)
