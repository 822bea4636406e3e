"""T1 and T2: all implementations against float64, isolation of events, gradients, budgets and wrong input."""
import copy
import math

import pytest
import torch

from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector
from iceaggr.dom_transformer import (
    DOMTransformer,
    chunk_lengths,
    pad_rows,
    padded_t1,
    rows_with_layers,
)
from iceaggr.event_transformer import EventTransformer, padded_t2, strongest_doms
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.simulation.dataset import demo_dataset

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*flex_attention called without torch.compile")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KEYS = ("global_dom_ids", "total_doms", "dom_to_event_idx", "sensor_ids", "event_ids", "targets",
        "event_dom_counts", "dom_features")


@pytest.fixture(scope="module")
def events():
    "24 simulated events, and one with the pulses of twelve of them on three DOMs."
    ds = IceCubeDataset(demo_dataset(), batch_ids=[1], max_events=24)
    events = [ds[i] for i in range(24)]
    piled = torch.cat([e["pulse_features"] for e in events[:12]])
    piled[:, 2] = piled[:, 2] % 3
    piled = piled[piled[:, 0].argsort(stable=True)]
    extreme = dict(event_id=torch.tensor(-5), pulse_features=piled, n_pulses=torch.tensor(len(piled)))
    return [*events, events[0] | extreme]


@pytest.fixture(scope="module")
def t1():
    "A small T1."
    torch.manual_seed(0)
    return DOMTransformer(d_model=32, n_heads=2, n_layers=2).eval()


def run_t1(t1, batch, kernel, dtype=torch.float32, max_batch_size=64):
    "Embeddings, and gradients of a fixed projection where gradients are enabled."
    t1 = copy.deepcopy(t1).to(dtype)
    t1.kernel = kernel
    out, _ = t1(batch, max_batch_size)
    if not torch.is_grad_enabled(): return out.double(), []
    weight = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((out * weight.to(dtype)).sum(), list(t1.parameters()))
    return out.detach().double(), [g.double() for g in gradients]


def assert_close_gradients(found, expected):
    "Each gradient within 0.01 % in norm."
    for g, e in zip(found, expected, strict=True): assert (g - e).norm() <= 1e-4 * e.norm() + 1e-9


@torch.no_grad()
def by_event(t1, batch):
    "The embeddings of each event."
    embeddings, m = t1(batch)
    return {int(i): embeddings[m["dom_to_event_idx"] == n] for n, i in enumerate(m["event_ids"])}


def is_close(a, b): return a.shape == b.shape and (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_t1_implementations_agree(events, pool):
    "Grouped, packed and padded T1 agree with float64 on dense masks; cut into few or many sequences."
    torch.manual_seed(1)
    t1, batch = DOMTransformer(32, 2, 2, pool=pool), collate_dom_packing(events)
    expected, references = run_t1(t1, batch, "dense", torch.float64)
    for kernel, size in (("grouped", 64), ("grouped", 2), ("dense", 64)):
        out, gradients = run_t1(t1, batch, kernel, max_batch_size=size)
        assert (out - expected).abs().max() < 1e-5, kernel
        assert_close_gradients(gradients, references)
    with torch.no_grad():
        for kernel, size in (("dense", 3), ("dense", 1), ("flex", 8)):
            assert (run_t1(t1, batch, kernel, max_batch_size=size)[0] - expected).abs().max() < 1e-5
        assert (padded_t1(t1, batch, "dense") - expected).abs().max() < 1e-5


def test_t1_events_are_isolated(events, t1):
    "Order, company, length of sequences, cuts and the clock change nothing; a changed event changes alone."
    batch = collate_dom_packing(events)
    reference = by_event(t1, batch)
    for other in (events[::-1], events[10:], events[3:4]):
        assert all(is_close(e, reference[i]) for i, e in by_event(t1, collate_dom_packing(other)).items())
    longer = by_event(t1, collate_dom_packing(events[:24], 1024))
    assert all(is_close(e, reference[i]) for i, e in longer.items())
    with torch.no_grad(): assert is_close(torch.cat([t1(p)[0] for p in split_batch(batch, 2)]), t1(batch)[0])
    shift = torch.tensor([4_096.0, 0, 0, 0])
    later = [dict(e, pulse_features=e["pulse_features"] + shift) for e in events]
    assert all(is_close(e, reference[i]) for i, e in by_event(t1, collate_dom_packing(later)).items())
    brighter = events[0]["pulse_features"] * torch.tensor([1.0, 3, 1, 1])
    changed = by_event(t1, collate_dom_packing([dict(events[0], pulse_features=brighter), *events[1:]]))
    first = int(events[0]["event_id"])
    assert not is_close(changed[first], reference[first])
    assert all(is_close(changed[i], reference[i]) for i in reference if i != first)


@torch.no_grad()
def test_t1_needs_no_notes_of_the_packing(events, t1):
    "A batch with the contract's keys only gives the same embeddings."
    batch = collate_dom_packing(events)
    plain = dict(batch, metadata={k: batch["metadata"][k] for k in KEYS})
    assert torch.equal(t1(plain)[0], t1(batch)[0])


def test_t1_extremes(events, t1):
    "One pulse; 1,500 pulses on one DOM; both; and every parameter gets a gradient."
    def event(n, pulses): return dict(event_id=torch.tensor(n), n_pulses=torch.tensor(len(pulses)),
                                      pulse_features=pulses)
    one = event(1, torch.tensor([[9_999.0, 0.025, 3, 1]]))
    time = torch.arange(1500.0) * 3 + 9_000
    long = event(2, torch.stack([time, time * 0 + 500, time * 0 + 7, time * 0], 1))
    for batch in ([one], [long], [one, long]):
        embeddings, _ = t1(collate_dom_packing(batch))
        assert len(embeddings) == len(batch) and embeddings.isfinite().all()
    t1.zero_grad()
    t1(collate_dom_packing(events))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in t1.parameters())


def test_t1_pieces():
    "Chunks of long DOMs; rows rounded up to few numbers; sequences that need the layers."
    assert chunk_lengths(torch.tensor([1, 4, 9, 5]), 4).tolist() == [1, 4, 4, 4, 1, 4, 1]
    assert pad_rows(torch.ones(5, 2), -1).sum(1).tolist() == [2.0] * 5 + [-2.0] * 3
    assert len({len(pad_rows(torch.ones(n, 2), -1)) for n in range(1, 513)}) == 20
    for ids, n in (([[0, 0], [1, 2]], 1), ([[1, 2], [0, 0]], 2),
                   ([[1, 2], [3, -1], [-1, -1]], 0), ([[0, 1, -1, -1]], 0)):
        assert rows_with_layers(torch.tensor(ids)) == n


@pytest.fixture(scope="module")
def t2_input():
    "A small T2, its arguments for events of 1 to 5,160 DOMs, and the size of each event."
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1, 60, 44, 2, 1, 800, 61, 70, 5160])
    ids = torch.cat([torch.randperm(5160, generator=g)[:n].sort().values for n in sizes])
    event = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    time = 10_000 + 1_000 * torch.rand(len(ids), generator=g).round(decimals=3)
    charge = torch.randint(1, 200, (len(ids),), generator=g) * 0.025
    features = torch.stack([time, charge, torch.ones(len(ids))], 1)
    embeddings = torch.randn(len(ids), 32, generator=g)
    t2 = EventTransformer(48, 2, 2, d_dom=32).eval()
    return t2, (embeddings, ids, event, len(sizes), features)


def test_t2_gives_directions(t2_input):
    "Angles in their ranges, unit vectors, kappa above 0, and all of them agree."
    t2, args = t2_input
    with torch.no_grad(): angles, (unit, kappa) = t2(*args), t2.direction(*args)
    azimuth, zenith = angles.T
    assert angles.shape == (9, 2) and (azimuth >= 0).all() and (azimuth < 2 * math.pi).all()
    assert (zenith >= 0).all() and (zenith <= math.pi).all() and (kappa > 0).all()
    assert torch.allclose(unit.norm(dim=1), torch.ones(9))
    assert torch.allclose(angles_to_vector(azimuth, zenith), unit, atol=1e-5)


def test_t2_implementations_agree(t2_input):
    "Grouped, packed and padded T2 agree with float64 on dense masks, in values and gradients."
    t2, (embeddings, ids, event, _, features) = t2_input
    small = event < 5

    def run(kernel, dtype):
        model = copy.deepcopy(t2).to(dtype)
        model.kernel = kernel
        x = embeddings[small].to(dtype).requires_grad_()
        v = model.vector(x, ids[small], event[small], 5, features[small])
        if not torch.is_grad_enabled(): return v.double(), []
        gradients = torch.autograd.grad(v.sum(), [x, *model.parameters()])
        return v.detach().double(), [g.double() for g in gradients]

    expected, references = run("dense", torch.float64)
    for kernel in ("grouped", "dense"):
        v, gradients = run(kernel, torch.float32)
        assert (v - expected).abs().max() < 1e-5, kernel
        assert_close_gradients(gradients, references)
    metadata = dict(sensor_ids=ids[small], dom_features=features[small], dom_to_event_idx=event[small],
                    event_ids=torch.arange(5))
    with torch.no_grad():
        assert (run("flex", torch.float32)[0] - expected).abs().max() < 1e-5
        assert (padded_t2(t2, embeddings[small], metadata) - expected).abs().max() < 1e-5


@torch.no_grad()
def test_t2_events_are_isolated(t2_input):
    "Order, company and the clock change nothing; embeddings, features and positions matter."
    t2, args = t2_input
    embeddings, ids, event, B, features = args
    v, order = t2.vector(*args), torch.randperm(len(ids))
    shuffled = t2.vector(embeddings[order], ids[order], event[order], B, features[order])
    assert torch.allclose(shuffled, v, atol=1e-5)
    for n in (0, 1, 5):
        own = event == n
        single = t2.vector(embeddings[own], ids[own], event[own] * 0, 1, features[own])
        assert torch.allclose(single[0], v[n], atol=1e-5)
    changed = torch.where((event == 2)[:, None], -embeddings, embeddings)
    w, others = t2.vector(changed, *args[1:]), torch.arange(B) != 2
    assert torch.equal(w[others], v[others]) and not torch.allclose(w[2], v[2])
    later = features + torch.tensor([2_048.0, 0, 0])
    assert torch.allclose(t2.vector(*args[:4], later), v, atol=1e-5)
    assert not torch.allclose(t2.vector(*args[:4]), v)
    assert not torch.allclose(t2.vector(embeddings, (ids + 700) % 5160, event, B, features), v)


@torch.no_grad()
def test_t2_in_half_precision(t2_input):
    "Positions stay in float32, and autocast keeps the direction to a few degrees."
    t2, args = t2_input
    half = copy.deepcopy(t2).to(torch.bfloat16)
    assert half.sensors.dtype == torch.float32 and half.embed.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16): rounded = t2.direction(*args)[0]
    cosine = (rounded * t2.direction(*args)[0]).sum(1).clamp(max=1)
    assert torch.rad2deg(torch.arccos(cosine)).max() < 3


def test_t2_gradients_reach_every_parameter(t2_input):
    "No parameter is without a gradient."
    t2, (embeddings, ids, event, _, features) = t2_input
    small = event < 5
    t2.zero_grad()
    t2.vector(embeddings[small], ids[small], event[small], 5, features[small]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in t2.parameters())


@torch.no_grad()
def test_t2_budget_of_doms(t2_input):
    "The most charge stays, among equals the earliest, then the lower sensor; what is left out is reported."
    features = torch.tensor([[10.0, 1, 1], [5, 1, 1], [7, 9, 3], [1, 1, 1], [1, 1, 1], [99, 3, 1]])
    kept = strongest_doms(features, torch.tensor([1, 2, 3, 9, 4, 5]), torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    assert kept.tolist() == [1, 2, 4, 5]
    t2, args = t2_input
    budget, v = copy.deepcopy(t2), t2.vector(*args)
    budget.max_doms = 50
    with pytest.warns(UserWarning, match="5901 DOMs of 5 events"): limited = budget.vector(*args)
    assert torch.allclose(limited[[0, 2, 3, 4]], v[[0, 2, 3, 4]], atol=1e-5)
    assert not torch.allclose(limited[1], v[1])
    with pytest.raises(ValueError, match="needs dom_features"): budget.vector(*args[:4])


def test_t2_wrong_input_is_named(t2_input):
    "Unknown sensors, wrong numbers of events and rows that do not fit are errors."
    t2, (embeddings, ids, event, B, features) = t2_input
    right = dict(dom_embeddings=embeddings, dom_ids=ids, dom_to_event_idx=event, batch_size=B,
                 dom_features=features)
    wrong = ((dict(dom_ids=ids + 1), "sensor 5160"),
             (dict(batch_size=8), "batch_size"),
             (dict(batch_size=10), "no DOMs"),
             (dict(dom_features=features[:5]), "one row per DOM"))
    for change, words in wrong:
        with pytest.raises(ValueError, match=words): t2(**right | change)
    for model in (DOMTransformer, EventTransformer):
        with pytest.raises(ValueError, match="unknown kernel"): model(32, 2, 1, kernel="other")


@cuda
@torch.no_grad()
def test_cuda_agrees(t2_input):
    "T2 on a GPU gives the vectors of the CPU."
    t2, args = t2_input
    gpu = copy.deepcopy(t2).cuda()
    found = gpu.vector(*[a.cuda() if torch.is_tensor(a) else a for a in args]).cpu()
    assert (found - t2.vector(*args)).abs().max() < 1e-4
