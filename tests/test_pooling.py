"""Pooling: `Segments` on both layouts, custom poolings, and DOMs longer than a packed sequence."""
import copy

import pytest
import torch
from torch import nn

from iceaggr.dom_transformer import DOMTransformer, encode_pulses, pulses_by_dom
from iceaggr.engine.cpu_attention import GroupedLayout
from iceaggr.packing import collate_dom_packing
from iceaggr.pooling import AttentionPool, MeanPool, Segments

LENGTHS = [[1], [5], [3, 1, 3, 2], [17, 18, 20, 21, 1, 40, 30], [2] * 50 + [16] * 3 + [300]]


class MaxPool(nn.Module):
    "The largest value of each channel."
    def __init__(self, d_model):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x, segments): return segments.reduce(self.norm(x), "max")


class QuantilePool(nn.Module):
    "A soft quantile per channel: a softmax over the values themselves, whose sharpness is learned."
    def __init__(self, d_model):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.sharpness = nn.Parameter(torch.linspace(-3, 3, d_model))

    def forward(self, x, segments):
        x = self.norm(x)
        return segments.reduce(segments.softmax(self.sharpness * x) * x, "sum")


POOLS = [AttentionPool, MeanPool, MaxPool, QuantilePool]


def event(event_id, pulses_per_dom, seed=0):
    "An event with the given numbers of pulses per DOM."
    g = torch.Generator().manual_seed(seed)
    sensor = torch.repeat_interleave(torch.arange(len(pulses_per_dom)) * 7.0, torch.tensor(pulses_per_dom))
    n = len(sensor)
    time = (9_000 + 3_000 * torch.rand(n, generator=g)).sort().values
    charge, auxiliary = torch.rand(n, generator=g) + 0.1, torch.zeros(n)
    pulses = torch.stack([time, charge, sensor[torch.randperm(n, generator=g)], auxiliary], 1)
    return {"pulse_features": pulses, "event_id": torch.tensor(event_id), "n_pulses": torch.tensor(n)}


EVENTS = [event(1, [1_200, 1, 3, 40], seed=1), event(2, [1, 1, 2, 513, 512], seed=2), event(3, [1], seed=3)]


def make_t1(pool):
    "A small T1 with a pooling class."
    torch.manual_seed(0)
    return DOMTransformer(32, 2, 2, pool=pool(32)).eval()


def embed_by_definition(t1, batch, chunk=512):
    "T1 in float64, DOM by DOM: dense attention within chunks, then pooling over the whole DOM."
    t1, batch = copy.deepcopy(t1).double(), dict(batch)
    pulses, counts = pulses_by_dom(batch)
    dom = torch.arange(len(counts)).repeat_interleave(counts)
    x, embeddings = encode_pulses(t1, pulses, dom, batch["metadata"]).double(), []
    for own in x.split(counts.tolist()):
        pieces = [piece if len(piece) == 1 else dense_blocks(t1.blocks, piece) for piece in own.split(chunk)]
        segments = Segments(torch.zeros(len(own), dtype=torch.int64), 1)
        embeddings.append(t1.pool(torch.cat(pieces), segments)[0])
    return t1, torch.stack(embeddings)


def dense_blocks(blocks, x):
    "All tokens attend to each other; written out."
    for block in blocks:
        q, k, v = block.attention.qkv(block.norm1(x)).view(len(x), 3, 2, 16).permute(1, 2, 0, 3)
        attended = (q @ k.transpose(1, 2) / 4).softmax(2) @ v
        x = x + block.attention.out(attended.transpose(0, 1).flatten(1))
        x = x + block.mlp(block.norm2(x))
    return x


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("how", ["sum", "mean", "max", "min"])
def test_reduce_is_a_loop(lengths, how):
    "`reduce` of both kinds of segments is the loop over segments."
    lengths = torch.tensor(lengths)
    x = torch.randn(int(lengths.sum()), 2, 3, dtype=torch.float64)
    function = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[how]
    expected = torch.stack([function(own, 0) for own in x.split(lengths.tolist())])
    ids = torch.arange(len(lengths)).repeat_interleave(lengths)
    shuffle = torch.randperm(len(ids))
    assert torch.allclose(Segments(ids[shuffle], len(lengths)).reduce(x[shuffle], how), expected, atol=1e-12)
    layout = GroupedLayout(lengths, 100)
    parts = [part.segments.reduce(layout.arrange(x)[part.tokens], how) for part in layout.parts]
    assert torch.allclose(layout.restore(torch.cat(parts)), expected, atol=1e-12)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_softmax_and_expand(lengths):
    "Weights sum to 1 per segment, also for logits of 1,000; `expand` gives each token its segment's value."
    lengths = torch.tensor(lengths)
    logits = 1_000 * torch.randn(int(lengths.sum()), 2, dtype=torch.float64)
    expected = torch.cat([own.softmax(0) for own in logits.split(lengths.tolist())])
    ids, y = torch.arange(len(lengths)).repeat_interleave(lengths), torch.randn(len(lengths), 3)
    segments = Segments(ids, len(lengths))
    assert torch.allclose(segments.softmax(logits), expected, atol=1e-12)
    assert torch.equal(segments.expand(y), y[ids])
    layout = GroupedLayout(lengths, 100)
    parts = [part.segments.softmax(layout.arrange(logits)[part.tokens]) for part in layout.parts]
    assert torch.allclose(layout.restore_tokens(torch.cat(parts)), expected, atol=1e-12)
    start = 0
    for part in layout.parts:
        own = layout.segment_order[start:start + part.segments.n]
        assert torch.equal(part.segments.expand(y[own]), layout.arrange(y[ids])[part.tokens])
        start += part.segments.n


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kernel", ["grouped", "dense"])
def test_pooling_is_exact_for_long_doms(pool, kernel):
    "DOMs of 1,200, 513 and fewer pulses against the float64 definition: values and gradients."
    t1, batch = make_t1(pool), collate_dom_packing(EVENTS)
    double, expected = embed_by_definition(t1, batch)
    t1.kernel = kernel
    found = t1(batch)[0]
    assert (found.double() - expected).abs().max() < 2e-5
    weight = torch.randn(expected.shape, dtype=torch.float64)
    gradients = torch.autograd.grad((found * weight.float()).sum(), list(t1.parameters()))
    references = torch.autograd.grad((expected * weight).sum(), list(double.parameters()))
    for g, e in zip(gradients, references, strict=True): assert (g - e).norm() <= 1e-3 * e.norm() + 1e-6


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kernel", ["grouped", "dense"])
@torch.no_grad()
def test_events_are_isolated(pool, kernel):
    "Changing one event, with its DOM of 1,200 pulses, leaves the others as they were."
    t1 = make_t1(pool)
    t1.kernel = kernel
    before, metadata = t1(collate_dom_packing(EVENTS))
    after = t1(collate_dom_packing([event(1, [1_200, 1, 3, 40], seed=9), *EVENTS[1:]]))[0]
    others = metadata["dom_to_event_idx"] != 0
    assert torch.allclose(after[others], before[others], atol=1e-5)
    assert not torch.allclose(after[~others], before[~others], atol=1e-3)


def test_keys_of_the_weights():
    "The names that the shipped weights use."
    assert list(AttentionPool(8).state_dict()) == [
        "norm.weight", "norm.bias", "logits.weight", "value.weight", "value.bias"]


def test_wrong_settings_are_named():
    "An unknown pooling, an unknown reduction and a wrong number of queries are errors."
    with pytest.raises(ValueError, match="pool must be"): DOMTransformer(32, 2, 1, pool="median")
    with pytest.raises(ValueError, match="multiple of n_queries"): AttentionPool(30, 4)
    grouped = GroupedLayout(torch.tensor([2, 2, 20, 200])).parts[0].segments
    for segments in (Segments(torch.zeros(224, dtype=torch.int64), 1), grouped):
        with pytest.raises(ValueError, match="how is"): segments.reduce(torch.ones(224), "median")
