"""Packing, cutting and the paths of T1 for arbitrary events."""
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iceaggr.accumulator import EventAccumulator
from iceaggr.dom_transformer import DOMTransformer
from iceaggr.packing import collate_dom_packing, split_batch

# An event: pulses on a few sensors, some of them many times, in any order of time.
event = st.lists(st.tuples(st.integers(0, 5159), st.integers(1, 70)), min_size=1, max_size=6)
batches = st.lists(event, min_size=1, max_size=5)


def make(doms, event_id):
    sensor = torch.cat([torch.full((n,), float(s)) for s, n in doms])
    g = torch.Generator().manual_seed(event_id)
    time = torch.randint(0, 80_000, sensor.shape, generator=g).float()
    charge = torch.randint(1, 4_000, sensor.shape, generator=g) * 0.025
    aux = torch.randint(0, 2, sensor.shape, generator=g).float()
    return dict(pulse_features=torch.stack([time, charge, sensor, aux], 1), event_id=torch.tensor(event_id), n_pulses=torch.tensor(len(sensor)))


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
    assert (pulses[:, 0].diff() >= 0)[owner.diff() == 0].all()          # the order of time, also from chunk to chunk
    for d in range(m["total_doms"]):                       # a DOM that fits lies in one sequence, in the order of time
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
