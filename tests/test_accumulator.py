"""The accumulator: whole events from any parts, and batches that do not fit together."""
import pytest
import torch

from iceaggr.accumulator import EventAccumulator
from iceaggr.data import IceCubeDataset
from iceaggr.dom_transformer import DOMTransformer
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.simulation.dataset import demo_dataset


@pytest.fixture(scope="module")
def batch():
    dataset = IceCubeDataset(demo_dataset(), batch_ids=[1], max_events=24)
    return collate_dom_packing(dataset.__getitems__(range(24)), max_seq_len=128)


@pytest.fixture(scope="module")
def t1():
    torch.manual_seed(0)
    return DOMTransformer(32, 2, 1).eval()


def metadata(events, sensors, counts, of=None):
    "Metadata of some DOMs."
    of = list(range(len(events))) if of is None else of
    return dict(event_ids=torch.tensor(events), dom_to_event_idx=torch.tensor(of),
                sensor_ids=torch.tensor(sensors),
                event_dom_counts=None if counts is None else torch.tensor(counts))


def test_parts_give_what_the_whole_batch_gives(batch, t1):
    "Embeddings, sensors, features and targets of each event, once."
    m, accumulator, found = batch["metadata"], EventAccumulator(), {}
    for part in split_batch(batch, max_sequences=2):
        accumulator.add_batch(*t1(part))
        for t2_batch in accumulator.get_complete_events(batch_size=4):
            for n, event_id in enumerate(t2_batch["event_ids"].tolist()):
                assert event_id not in found
                found[event_id] = (t2_batch, t2_batch["dom_to_event_idx"] == n, t2_batch["targets"][n])
    assert not accumulator.incomplete() and not accumulator.events and len(found) == 24
    whole, _ = t1(batch)
    for n, event_id in enumerate(m["event_ids"].tolist()):
        mine, (t2_batch, rows, target) = m["dom_to_event_idx"] == n, found[event_id]
        assert torch.equal(t2_batch["dom_ids"][rows], m["sensor_ids"][mine])
        assert torch.equal(t2_batch["dom_features"][rows], m["dom_features"][mine])
        assert torch.equal(target, m["targets"][n])
        torch.testing.assert_close(t2_batch["dom_embeddings"][rows], whole[mine], atol=1e-5, rtol=0)


def test_gradient_of_one_event(batch, t1):
    "It passes through every part that the event was spread over."
    m, accumulator = batch["metadata"], EventAccumulator()
    largest = int(m["event_dom_counts"].argmax())
    for part in split_batch(batch, 2): accumulator.add_batch(*t1(part))
    t2_batch, = accumulator.get_complete_events(batch_size=24)
    place = t2_batch["event_ids"].tolist().index(int(m["event_ids"][largest]))
    rows = t2_batch["dom_embeddings"][t2_batch["dom_to_event_idx"] == place]
    found = torch.autograd.grad(rows.square().sum(), list(t1.parameters()))
    whole = t1(batch)[0][m["dom_to_event_idx"] == largest]
    expected = torch.autograd.grad(whole.square().sum(), list(t1.parameters()))
    assert found[0].abs().sum() > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_missing_doms_are_named(batch, t1):
    parts, accumulator = list(split_batch(batch, 3)), EventAccumulator()
    with torch.no_grad():
        for part in parts[:-1]: accumulator.add_batch(*t1(part))
    missing = accumulator.incomplete()
    assert missing and set(missing) <= set(parts[-1]["metadata"]["event_ids"].tolist())
    assert all(held < expected for held, expected in missing.values())
    complete = [int(i) for b in accumulator.get_complete_events() for i in b["event_ids"]]
    assert set(missing).isdisjoint(complete)
    accumulator.clear()
    assert not accumulator.events


@pytest.mark.parametrize("wrong, words", [
    (metadata([777, 5], [5, 1], [1, 3]), "event 5: DOM 1 came twice"),
    (metadata([777, 5], [5, 5159], [1, 1]), "two events with one id"),
    (metadata([1], [1, 2], [1], of=[0, 0]), "more than the 1 expected"),
    (metadata([777, 5], [5, 5], [1, 3], of=[0, 0]), "event 777: DOM 5 came twice in one batch"),
    (metadata([777, 777], [5, 6], [1, 1]), "event_id occurs twice"),
    (metadata([777], [5, 6, 7], [3], of=[0, 0, 0]), "of the same batch")])
def test_an_error_leaves_what_is_held(wrong, words):
    accumulator = EventAccumulator()
    accumulator.add_batch(torch.zeros(2, 4), metadata([5], [1, 2], [3], of=[0, 0]))
    with pytest.raises(ValueError, match=words): accumulator.add_batch(torch.zeros(2, 4), wrong)
    assert accumulator.incomplete() == {5: (2, 3)} and list(accumulator.events) == [5]


def test_an_event_may_come_again_once_it_was_handed_out():
    accumulator = EventAccumulator()
    for _ in range(2):
        accumulator.add_batch(torch.ones(1, 4), metadata([5], [1], [1]))
        assert [b["event_ids"].tolist() for b in accumulator.get_complete_events()] == [[5]]


def test_without_counts_every_event_is_complete():
    accumulator = EventAccumulator()
    accumulator.add_batch(torch.ones(3, 4), metadata([5, 6], [1, 2, 1], None, of=[0, 0, 1]))
    first, second = accumulator.get_complete_events(1)
    assert (first["event_ids"].tolist(), second["event_ids"].tolist()) == ([5], [6])
    assert first["dom_to_event_idx"].tolist() == [0, 0] and first["dom_features"] is None
