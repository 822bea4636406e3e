"""Poolings, those of the package and new ones: exact on every path of T1, for DOMs of any length."""
import copy

import pytest
import torch
from definitions import (
    assert_same_gradients,
    attention_pool_of,
    embeddings_of,
    gradients,
    in_float64,
    mean_pool_of,
)
from torch import nn

from iceaggr.data import IceCubeDataset
from iceaggr.dom_transformer import DOMTransformer
from iceaggr.engine.cpu_attention import GroupedLayout, GroupedSegments
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.pooling import AttentionPool, MeanPool, Segments, full_precision, make_pool

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*flex_attention called without torch.compile")


# Poolings as a user writes them, and their definitions for one DOM


class MaxPool(nn.Module):
    "The largest value of each channel."
    def __init__(self, d_model):
        super().__init__()
        self.norm = nn.LayerNorm(d_model)

    def forward(self, x, segments): return segments.reduce(self.norm(x), "max")


def max_pool_of(pool, x): # (n, C) -> (C,)
    return pool.norm(x).amax(0)


class QuantilePool(nn.Module):
    "A learned soft quantile per channel: from the minimum (rank << 0) over the mean (0) to the maximum."
    def __init__(self, d_model):
        super().__init__()
        self.rank = nn.Parameter(torch.linspace(-4, 4, d_model))

    def forward(self, x, segments): return segments.reduce(segments.softmax(self.rank * x) * x)


def quantile_pool_of(pool, x): # (n, C) -> (C,)
    return ((pool.rank * x).softmax(0) * x).sum(0)


class SpreadPool(nn.Module):
    "Mean and standard deviation over each DOM, mixed by a linear layer."
    def __init__(self, d_model):
        super().__init__()
        self.mix = nn.Linear(2 * d_model + 1, d_model)

    def forward(self, x, segments):
        mean = segments.reduce(x, "mean")
        spread = (segments.reduce((x - segments.expand(mean)) ** 2, "mean") + 1e-3).sqrt()
        count = segments.lengths.to(x.dtype).log()[:, None]
        return self.mix(torch.cat([mean, spread, count], 1))


def spread_pool_of(pool, x): # (n, C) -> (C,)
    spread = (x.var(0, correction=0) + 1e-3).sqrt()
    return pool.mix(torch.cat([x.mean(0), spread, x.new_tensor([len(x)]).log()]))


POOLS = {
    "max": (MaxPool, max_pool_of),
    "quantile": (QuantilePool, quantile_pool_of),
    "spread": (SpreadPool, spread_pool_of),
    "mean": (MeanPool, mean_pool_of),
    "attention": (AttentionPool, attention_pool_of),
}
each_pool = pytest.mark.parametrize("name", POOLS)


def make_event(event_id, doms): # doms: {sensor: number of pulses}
    "An event with so many pulses on each sensor."
    generator = torch.Generator().manual_seed(event_id)
    sensor = torch.cat([torch.full((n,), float(sensor)) for sensor, n in doms.items()])
    n = len(sensor)
    time = 9_000 + torch.rand(n, generator=generator) * 4_000
    charge = 0.1 + torch.rand(n, generator=generator)
    auxiliary = torch.randint(0, 2, (n,), generator=generator).float()
    pulses = torch.stack([time.round(), charge, sensor, auxiliary], 1)
    pulses = pulses[pulses[:, 0].argsort(stable=True)]
    return {
        "event_id": torch.tensor(event_id),
        "n_pulses": torch.tensor(n),
        "pulse_features": pulses,
        "target": torch.tensor([1.0, 2.0]),
    }


@pytest.fixture(scope="module")
def events():
    "Five events: single pulses, DOMs of all lengths, and DOMs of 1,200, 700 and 513 pulses."
    return [
        make_event(1, {7: 1}),
        make_event(2, {77: 1_200, 78: 3, 80: 1}),
        make_event(3, {sensor: 1 + sensor % 4 for sensor in range(100, 140)}),
        make_event(4, {5: 700, 9: 20, 11: 22, 12: 21, 13: 2, 500: 513, 501: 512}),
        make_event(5, {60 * n: n + 1 for n in range(40)}),
    ]


@pytest.fixture(scope="module")
def batch(events):
    batch = collate_dom_packing(events, 512)
    assert batch["metadata"]["dom_pulse_counts"].max() == 1_200
    return batch


def make_t1(name):
    torch.manual_seed(0)
    return DOMTransformer(32, 2, 1, pool=POOLS[name][0](32))


@pytest.fixture(scope="module")
def expected(batch):
    "Embeddings and gradients of each pooling in float64, DOM by DOM."
    found = {}
    for name, (_, pool_of) in POOLS.items():
        t1 = in_float64(make_t1(name))
        embeddings = embeddings_of(t1, batch, pool_of)
        found[name] = embeddings.detach(), gradients(embeddings, list(t1.parameters()))
    return found


# On every path of T1


@each_pool
@pytest.mark.parametrize("kernel", ["grouped", "dense"])
def test_values_and_gradients_agree_with_the_definition(batch, expected, name, kernel):
    "With a DOM of 1,200 pulses; in float32."
    t1 = make_t1(name)
    t1.kernel = kernel
    embeddings, _ = t1(batch)
    values, expected_gradients = expected[name]
    assert (embeddings.double() - values).abs().max() < 2e-5
    assert_same_gradients(gradients(embeddings, list(t1.parameters())), expected_gradients)


@each_pool
@pytest.mark.parametrize("kernel, max_batch_size", [
    ("grouped", 64), ("grouped", 1), ("dense", 64), ("dense", 1), ("flex", 64), ("flex", 2)])
def test_values_without_gradients_agree_with_the_definition(batch, expected, name, kernel, max_batch_size):
    t1 = make_t1(name).eval()
    t1.kernel = kernel
    with torch.no_grad(): embeddings, _ = t1(batch, max_batch_size)
    assert (embeddings.double() - expected[name][0]).abs().max() < 2e-5


@each_pool
@pytest.mark.parametrize("kernel", ["grouped", "dense"])
def test_float64_agrees_to_rounding(batch, expected, name, kernel):
    t1 = in_float64(make_t1(name))
    t1.kernel = kernel
    with torch.no_grad(): embeddings, _ = t1(batch)
    assert (embeddings - expected[name][0]).abs().max() < 1e-12


@each_pool
def test_parts_of_a_batch_give_the_same(batch, expected, name):
    "A DOM of several chunks stays in one part."
    t1 = make_t1(name).eval()
    with torch.no_grad(): embeddings = torch.cat([t1(part)[0] for part in split_batch(batch, 1)])
    assert (embeddings.double() - expected[name][0]).abs().max() < 2e-5


@each_pool
@pytest.mark.parametrize("kernel", ["grouped", "dense", "flex"])
@pytest.mark.parametrize("changed", [1, 3])
def test_events_are_isolated(events, batch, name, kernel, changed):
    "Other charges in one event, with DOMs of several chunks, leave the others as they were, to the bit."
    t1 = make_t1(name).eval()
    t1.kernel = kernel
    pulses = events[changed]["pulse_features"] * torch.tensor([1.0, 3, 1, 1])
    other_batch = collate_dom_packing([*events[:changed], dict(events[changed], pulse_features=pulses),
                                       *events[changed + 1:]])
    with torch.no_grad(): (before, metadata), (after, _) = t1(batch), t1(other_batch)
    own = metadata["dom_to_event_idx"] == changed
    assert torch.equal(after[~own], before[~own])
    assert not torch.isclose(after[own], before[own]).all(1).any()


@each_pool
def test_pooling_in_bfloat16_stays_close(batch, expected, name):
    t1 = make_t1(name).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): embeddings, _ = t1(batch)
    if name != "spread": assert embeddings.dtype == torch.float32      # its last operation is a linear layer
    assert (embeddings.double() - expected[name][0]).norm() < 0.02 * expected[name][0].norm()


# Segments and GroupedSegments


LENGTHS = {
    "padded groups": [40, 41, 44, 50, 53, 53],
    "padded and exact groups": [2, 2, 5, 5, 5, 16, 17, 18, 40, 41, 300],
    "single tokens": [1, 1, 1],
    "mixed with a long one": [1, 3, 3, 7, 500],
}
HOW = ["sum", "mean", "max", "min"]
each_lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def both_segments(lengths): # ascending
    "The same segments with dense rows, part by part, and with scattered sums."
    lengths = torch.tensor(lengths)
    layout = GroupedLayout(lengths, 10_000)
    for part in layout.parts:
        n = part.segments.lengths
        ids = torch.arange(len(n)).repeat_interleave(n)
        yield part.segments, Segments(ids, len(n))


def tokens(n, *shape, requires_grad=False):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    return x.requires_grad_(requires_grad)


@each_lengths
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
@pytest.mark.parametrize("how", HOW)
def test_reductions_agree(lengths, how, shape):
    "With and without gradients, also of the values in padded groups, and for any further dimensions."
    for grouped, scattered in both_segments(lengths):
        assert grouped.n == scattered.n
        assert torch.equal(grouped.lengths, scattered.lengths)
        x = tokens(len(scattered.ids), *shape, requires_grad=True)
        found, expected = grouped.reduce(x, how), scattered.reduce(x, how)
        one_by_one = [x[scattered.ids == n] for n in range(scattered.n)]
        definition = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}[how]
        assert torch.allclose(expected, torch.stack([definition(own, 0) for own in one_by_one]), atol=1e-12)
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.allclose(grouped.reduce(x.detach(), how), expected, atol=1e-12)
        assert_same_gradients(gradients(found, [x]), gradients(expected, [x]), 1e-12)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("sign", [-1, 1])
def test_padding_never_counts(how, sign):
    "Values of one sign, where a zero in padding would win or weigh."
    for grouped, scattered in both_segments(LENGTHS["padded groups"]):
        assert isinstance(grouped, GroupedSegments) and grouped.groups[0].cells is not None
        for requires_grad in (False, True):
            x = (sign * (1 + tokens(len(scattered.ids), 4).abs())).requires_grad_(requires_grad)
            assert torch.allclose(grouped.reduce(x, how), scattered.reduce(x, how), atol=1e-12)


@pytest.mark.parametrize("how", ["max", "min"])
def test_gradients_of_equal_values_agree(how):
    "Equal values share the gradient."
    for grouped, scattered in both_segments(LENGTHS["padded and exact groups"]):
        x = tokens(len(scattered.ids), 4).round().requires_grad_()
        expected = gradients(scattered.reduce(x, how), [x])
        assert_same_gradients(gradients(grouped.reduce(x, how), [x]), expected, 1e-12)


@each_lengths
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_softmax_and_expand_agree(lengths, shape):
    for grouped, scattered in both_segments(lengths):
        logits = (5 * tokens(len(scattered.ids), *shape)).requires_grad_()
        found, expected = grouped.softmax(logits), scattered.softmax(logits)
        for n in range(scattered.n):
            own = scattered.ids == n
            assert torch.allclose(expected[own], logits[own].softmax(0), atol=1e-12)
        assert torch.allclose(found, expected, atol=1e-12)
        assert torch.allclose(grouped.softmax(logits.detach()), expected, atol=1e-12)
        assert_same_gradients(gradients(found, [logits]), gradients(expected, [logits]), 1e-10)
        values = tokens(scattered.n, *shape)
        assert torch.equal(grouped.expand(values), scattered.expand(values))


def test_softmax_of_large_logits_is_finite():
    for grouped, scattered in both_segments(LENGTHS["padded and exact groups"]):
        logits = 1e4 * tokens(len(scattered.ids), 2).float()
        for segments in (grouped, scattered):
            weight = segments.softmax(logits)
            assert weight.isfinite().all()
            assert torch.allclose(segments.reduce(weight), torch.ones(segments.n, 2))


@pytest.mark.parametrize("how", ["median", "", None])
def test_unknown_reductions_are_refused(how):
    message = 'how is "sum", "mean", "max" or "min"'
    for grouped, scattered in both_segments(LENGTHS["padded groups"]):
        for segments in (grouped, scattered):
            with pytest.raises(ValueError, match=message): segments.reduce(tokens(len(scattered.ids), 2), how)


def test_segments_in_any_order():
    ids = torch.tensor([2, 0, 1, 2, 0, 2])
    x = torch.tensor([5.0, 1, 7, 6, 3, 1])
    segments = Segments(ids, 3)
    assert segments.reduce(x).tolist() == [4, 7, 12]
    assert segments.reduce(x, "max").tolist() == [3, 7, 6]
    assert segments.reduce(x, "min").tolist() == [1, 7, 1]
    assert segments.lengths.tolist() == [2, 1, 3]


@pytest.mark.parametrize("how", ["sum", "mean"])
def test_sums_in_half_precision_are_taken_in_float32(how):
    "1,000 ones: bfloat16 stops counting at 256."
    for grouped, scattered in both_segments([1_000, 1_000]):
        for segments in (grouped, scattered):
            found = segments.reduce(torch.ones(2_000, 1, dtype=torch.bfloat16), how)
            assert found.dtype == torch.float32
            assert found.flatten().tolist() == ([1_000] * 2 if how == "sum" else [1] * 2)


def test_full_precision():
    precisions = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    found = [full_precision(torch.zeros(1, dtype=dtype)).dtype for dtype in precisions]
    assert found == [torch.float32] * 3 + [torch.float64]


# Making, training, saving


def test_poolings_by_name():
    own = MaxPool(32)
    assert type(make_pool("attention", 32)) is AttentionPool
    assert type(make_pool("mean", 32)) is MeanPool
    assert make_pool(own, 32) is own
    with pytest.raises(ValueError, match="pool must be .* got 'median'"):
        DOMTransformer(32, 2, 1, pool="median")
    with pytest.raises(ValueError, match="d_model=30 must be a multiple of n_queries=4"): AttentionPool(30)


@each_pool
def test_t1_with_a_pooling_learns(batch, name):
    "Every parameter gets a gradient, and a step lowers a loss."
    t1 = make_t1(name)
    optimizer = torch.optim.SGD(t1.parameters(), 1e-3)
    goal = torch.randn(batch["metadata"]["total_doms"], 32)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (t1(batch)[0] - goal).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in t1.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]



@pytest.mark.parametrize("pool, pool_of", [POOLS["max"], POOLS["quantile"]])
def test_model_with_another_pooling_trains_saves_and_loads(batch, tmp_path, pool, pool_of):
    "Its file names the pooling; without the class it is refused with an error that says so."
    from iceaggr.direction import angles_to_vector, vmf_loss
    torch.manual_seed(0)
    model = HierarchicalTransformer("small", pool=pool)
    before = copy.deepcopy(model.t1.pool.state_dict())
    target = angles_to_vector(*batch["metadata"]["targets"].T)
    vmf_loss(model.vector(batch), target).backward()
    torch.optim.AdamW(model.parameters()).step()
    for name, value in model.t1.pool.state_dict().items(): assert not torch.equal(before[name], value)
    path = tmp_path / "model.safetensors"
    model.save(path)
    with pytest.raises(ValueError, match=pool.__name__): HierarchicalTransformer.load(path)
    loaded = HierarchicalTransformer.load(path, pool=pool)
    assert type(loaded.t1.pool) is pool
    with torch.no_grad():
        assert torch.equal(loaded.vector(batch), model.eval().vector(batch))
        t1 = in_float64(loaded.t1)
        assert torch.allclose(t1(batch)[0], embeddings_of(t1, batch, pool_of), atol=1e-10)


def test_model_with_another_pooling_trains_by_step(tiny_dataset):
    from iceaggr.training import TrainSettings, train_step
    batch = collate_dom_packing(list(IceCubeDataset(tiny_dataset)))
    torch.manual_seed(0)
    model = HierarchicalTransformer("small", pool=MaxPool)
    optimizer, settings = torch.optim.AdamW(model.parameters()), TrainSettings()
    losses = [train_step(model, optimizer, batch, settings, 1e-3) for _ in range(5)]
    assert losses[-1] < losses[0]


def test_pretrained_weights_have_no_other_pooling():
    with pytest.raises(ValueError, match="saved without a pool of its own: load it without pool="):
        HierarchicalTransformer.load("small", pool=MaxPool)


def test_a_class_in_place_of_a_pooling_is_refused():
    "T1 takes an instance, a whole model the class."
    with pytest.raises(ValueError, match=r"call it, MeanPool\(d_model\)"): make_pool(MeanPool, 32)
