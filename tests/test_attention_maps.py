"Attention maps: weights that give the outputs of the model's own layers."
import numpy as np
import pytest
import torch

from iceaggr.attention import SegmentAttention, dense_attention
from iceaggr.attention_maps import (
    _attention_weights,
    _interval_means,
    dom_attention,
    event_attention,
)
from iceaggr.data import IceCubeDataset
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing
from iceaggr.simulation.dataset import demo_dataset


@pytest.fixture(scope="module")
def dataset():
    "Simulated events of the surveyed detector."
    return IceCubeDataset(demo_dataset())


@pytest.fixture(scope="module")
def model(dataset):
    "A small model without training, for the detector of the events."
    torch.manual_seed(0)
    return HierarchicalTransformer("small", dataset.geometry).eval()


@pytest.fixture(scope="module")
def event(dataset):
    "An event of about 400 pulses."
    return dataset[int((dataset.event_table().n_pulses - 400).abs().argmin())]


@pytest.fixture(scope="module")
def sensors(event):
    "Hit sensors, and the pulses of each."
    return np.unique(event["pulse_features"][:, 2].numpy().astype(int), return_counts=True)


@pytest.fixture(scope="module")
def busy(sensors):
    "The sensor with the most pulses."
    return int(sensors[0][sensors[1].argmax()])


def repeated(event, sensor_id, n):
    "The event with n pulses on one sensor and no others."
    own = event["pulse_features"][event["pulse_features"][:, 2] == sensor_id]
    own = own.repeat(-(-n // len(own)), 1)[:n]
    return dict(event, pulse_features=own, n_pulses=torch.tensor(n))


def embeddings(model, event):
    "DOM embeddings by the model's own kernels."
    with torch.no_grad(): return model.t1(collate_dom_packing([event], model.settings.max_seq_len))[0]


def test_weights_follow_the_definition():
    "Rows sum to 1, other segments get nothing, the output is that of dense attention."
    torch.manual_seed(0)
    layer, x = SegmentAttention(64, 4), torch.randn(9, 64)
    segments = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    with torch.no_grad():
        weights, output = _attention_weights(layer, x, segments)
        assert torch.allclose(output, layer.out(dense_attention(layer.qkv(x), segments, 4)), atol=1e-6)
    assert torch.allclose(weights.sum(-1), torch.ones(4, 9))
    assert (weights[:, segments[:, None] != segments] == 0).all()


def test_maps_give_the_outputs_of_the_model(model, event, busy):
    "Embedding of the DOM, direction of the event; all weights sum to 1; the model is left as it was."
    kernel = model.t1.kernel
    dom, whole = dom_attention(model, event, busy), event_attention(model, event)
    batch = collate_dom_packing([event])
    position = batch["metadata"]["sensor_ids"].tolist().index(busy)
    assert torch.allclose(dom.output, embeddings(model, event)[position], atol=1e-5)
    with torch.no_grad(): assert torch.allclose(whole.output, model.vector(batch)[0], rtol=1e-4, atol=1e-5)
    for maps in (dom, whole):
        n, one = len(maps.tokens), torch.ones(())
        assert maps.difference < 1e-4 and maps.weights.shape[2:] == (n, n)
        assert torch.allclose(maps.weights.sum(-1), one, atol=1e-5)
        assert torch.allclose(maps.pooling.sum(0), one, atol=1e-5)
    assert model.t1.kernel == kernel
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("rest", [300, 1], ids=["a rest", "a rest of one pulse"])
def test_attention_stays_in_its_chunk(rest, model, event, busy):
    "A DOM with more pulses than a sequence holds: attention per chunk, pooling over the whole DOM."
    L = model.settings.max_seq_len
    long = repeated(event, busy, L + rest)
    maps = dom_attention(model, long, busy)
    chunk = torch.arange(L + rest) // L
    assert len(maps.tokens) == L + rest and maps.difference < 1e-4
    assert (maps.weights[..., chunk[:, None] != chunk] == 0).all()
    assert torch.allclose(maps.output, embeddings(model, long)[0], atol=1e-4)


def test_doms_and_events_without_attention_are_refused(model, event, sensors, busy, monkeypatch):
    "A single pulse, a single DOM, a sensor that was not hit, too many DOMs."
    hit, count = sensors
    with pytest.raises(ValueError, match="single pulse"): dom_attention(model, event, int(hit[count == 1][0]))
    with pytest.raises(ValueError, match="single DOM"): event_attention(model, repeated(event, busy, 5))
    dark = int(np.setdiff1d(np.arange(5160), hit)[0])
    with pytest.raises(ValueError, match="not hit"): dom_attention(model, event, dark)
    monkeypatch.setattr(model.t2, "max_doms", 2)
    with pytest.raises(ValueError, match="max_doms=2"): event_attention(model, event)


def test_interval_means_hold_all_weight(model, event):
    "Mean times number of pairs, summed, is the weight of all pairs."
    maps = event_attention(model, event)
    x, y, mean = _interval_means(maps, 0, 1, longest=50_000.)
    r, n = maps.coordinates, len(maps.tokens)
    pairs = ~np.eye(n, dtype=bool)
    distance = np.linalg.norm((r[:, None] - r)[..., :3].numpy(), axis=-1)[pairs]
    later = (r[None, :, 3] - r[:, None, 3]).numpy()[pairs]
    count = np.histogram2d(distance, later, (x, y))[0]
    assert count.sum() == n * (n - 1)
    total = n * float(maps.weights[0, 1].numpy()[pairs].sum())
    assert np.isclose(np.nansum(mean * count), total, rtol=1e-4)
