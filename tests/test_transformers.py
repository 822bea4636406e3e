"""T1 and T2 against their definitions in float64, on every implementation; isolation, extremes and errors."""
import copy
import math
import warnings

import pytest
import torch
from definitions import (
    assert_same_gradients,
    attention_pool_of,
    embeddings_of,
    gradients,
    in_float64,
    mean_pool_of,
    trained,
    vectors_of,
)

from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector
from iceaggr.dom_transformer import (
    DOMTransformer,
    chunk_lengths,
    pad_rows,
    padded_t1,
    pulses_by_dom,
    rows_with_layers,
)
from iceaggr.event_transformer import EventTransformer, padded_t2, strongest_doms
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.simulation.dataset import demo_dataset

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*flex_attention called without torch.compile")


# T1


@pytest.fixture(scope="module")
def dataset():
    return IceCubeDataset(demo_dataset(), batch_ids=[1], max_events=100)


@pytest.fixture(scope="module")
def events(dataset):
    "48 events, and one with the pulses of all of them piled on three DOMs."
    events = [dataset[i] for i in range(48)]
    pulses = torch.cat([e["pulse_features"] for e in events])
    pulses[:, 2] = pulses[:, 2] % 3
    pulses = pulses[pulses[:, 0].argsort(stable=True)]
    n = torch.tensor(len(pulses))
    return [*events, dict(events[0], event_id=torch.tensor(-5), pulse_features=pulses, n_pulses=n)]


@pytest.fixture(scope="module")
def batch(events):
    batch = collate_dom_packing(events, 512)
    assert batch["metadata"]["dom_pulse_counts"].max() > 512
    return batch


def make_t1(pool="attention", kernel="auto"):
    torch.manual_seed(1)
    return DOMTransformer(32, 2, 2, pool=pool, kernel=kernel)


@pytest.fixture(scope="module")
def t1():
    return make_t1().eval()


@pytest.fixture(scope="module")
def expected(batch):
    "Embeddings and gradients of both poolings in float64, DOM by DOM."
    found = {}
    for pool, pool_of in (("attention", attention_pool_of), ("mean", mean_pool_of)):
        model = in_float64(make_t1(pool))
        embeddings = embeddings_of(model, batch, pool_of)
        found[pool] = embeddings.detach(), gradients(embeddings, list(model.parameters()))
    return found


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("kernel, max_batch_size", [("grouped", 64), ("grouped", 2), ("dense", 64)])
def test_t1_agrees_with_its_definition(batch, expected, pool, kernel, max_batch_size):
    "Values and gradients."
    model = make_t1(pool, kernel)
    embeddings, metadata = model(batch, max_batch_size)
    assert metadata is batch["metadata"]
    assert embeddings.shape == (metadata["total_doms"], 32)
    assert (embeddings.double() - expected[pool][0]).abs().max() < 1e-5
    assert_same_gradients(gradients(embeddings, list(model.parameters())), expected[pool][1])


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("kernel, max_batch_size", [
    ("grouped", 64), ("grouped", 1), ("dense", 3), ("dense", 1), ("flex", 8), ("flex", 1)])
def test_t1_without_gradients_agrees_with_its_definition(batch, expected, pool, kernel, max_batch_size):
    with torch.no_grad(): embeddings, _ = make_t1(pool, kernel)(batch, max_batch_size)
    assert (embeddings.double() - expected[pool][0]).abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize("scores", ["flex", "dense"])
def test_padded_t1_agrees_with_its_definition(batch, expected, pool, scores):
    with torch.no_grad(): embeddings = padded_t1(make_t1(pool), batch, scores, max_batch_size=5)
    assert (embeddings.double() - expected[pool][0]).abs().max() < 1e-5


def test_every_parameter_of_t1_gets_a_gradient(batch):
    model = make_t1()
    model(batch)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_t1_under_autocast_stays_close(batch, expected):
    "The sum that runs through the layers is kept in float32."
    model = make_t1()
    with torch.autocast("cpu", torch.bfloat16): embeddings, _ = model(batch)
    assert embeddings.dtype == torch.float32
    values = expected["attention"][0]
    assert (embeddings.double() - values).norm() < 0.02 * values.norm()


@torch.no_grad()
def embeddings_by_event(t1, batch): # {event_id: (doms, C)}
    embeddings, m = t1(batch)
    return {int(i): embeddings[m["dom_to_event_idx"] == n] for n, i in enumerate(m["event_ids"])}


def assert_same_events(found, expected):
    for event_id, embeddings in found.items():
        assert embeddings.shape == expected[event_id].shape, event_id
        assert (embeddings - expected[event_id]).abs().max() < 1e-5, event_id


@pytest.mark.parametrize("choice", [slice(None, None, -1), slice(20, None), slice(3, 4)])
def test_t1_does_not_depend_on_the_other_events_and_their_order(t1, events, batch, choice):
    found = embeddings_by_event(t1, collate_dom_packing(events[choice], 512))
    assert_same_events(found, embeddings_by_event(t1, batch))


def test_t1_does_not_depend_on_the_length_of_sequences(t1, events, batch):
    "As long as a DOM fits."
    found = embeddings_by_event(t1, collate_dom_packing(events[:48], 1024))
    assert_same_events(found, embeddings_by_event(t1, batch))


def test_t1_does_not_depend_on_the_cutting_into_parts(t1, batch):
    with torch.no_grad():
        parts = torch.cat([t1(part)[0] for part in split_batch(batch, 2)])
        assert (parts - t1(batch)[0]).abs().max() < 1e-5


def test_t1_does_not_depend_on_the_clock_of_an_event(t1, events, batch):
    shift = torch.tensor([4_096.0, 0, 0, 0])
    later = [dict(e, pulse_features=e["pulse_features"] + shift) for e in events]
    found = embeddings_by_event(t1, collate_dom_packing(later, 512))
    assert_same_events(found, embeddings_by_event(t1, batch))


def test_t1_changes_only_the_event_that_changes(t1, events, batch):
    charges = torch.tensor([1.0, 3, 1, 1])
    changed = [dict(events[0], pulse_features=events[0]["pulse_features"] * charges), *events[1:]]
    before = embeddings_by_event(t1, batch)
    after = embeddings_by_event(t1, collate_dom_packing(changed, 512))
    own = int(events[0]["event_id"])
    assert (after.pop(own) - before[own]).abs().max() > 1e-2
    for event_id, embeddings in after.items(): assert torch.equal(embeddings, before[event_id])


def test_batch_without_what_packing_notes_for_speed(t1, batch):
    "A batch made by other means: without offsets, counts and event times."
    keys = ("global_dom_ids", "total_doms", "dom_to_event_idx", "sensor_ids", "event_ids", "targets",
            "event_dom_counts", "dom_features")
    plain = dict(batch, metadata={key: batch["metadata"][key] for key in keys})
    with torch.no_grad(): assert torch.equal(t1(plain)[0], t1(batch)[0])


def event_of_one_dom(n, event_id):
    "n pulses on one DOM."
    time, sensor = 9_000 + 3 * torch.arange(float(n)), torch.full((n,), 7.0)
    pulses = torch.stack([time, torch.full((n,), 500.0), sensor, torch.zeros(n)], 1)
    return {"event_id": torch.tensor(event_id), "n_pulses": torch.tensor(n), "pulse_features": pulses}


@pytest.mark.parametrize("kernel", ["grouped", "dense", "flex"])
@pytest.mark.parametrize("sizes", [[1], [1_500], [1, 1_500], [512], [513], [2, 2]])
def test_extreme_events(sizes, kernel):
    "One pulse, one DOM, 1,500 pulses on one DOM."
    model = make_t1(kernel=kernel).eval()
    batch = collate_dom_packing([event_of_one_dom(n, i) for i, n in enumerate(sizes)], 512)
    with torch.no_grad():
        embeddings, _ = model(batch)
        expected = embeddings_of(in_float64(model), batch)
    assert embeddings.shape == (len(sizes), 32)
    assert (embeddings.double() - expected).abs().max() < 1e-5


def test_t1_on_a_batch_without_dom_of_several_pulses():
    "No sequence needs the layers."
    for kernel in ("grouped", "dense", "flex"):
        batch = collate_dom_packing([event_of_one_dom(1, i) for i in range(3)], 4)
        model = make_t1(kernel=kernel).eval()
        with torch.no_grad(): found = model(batch)[0]
        assert (found.double() - embeddings_of(in_float64(model), batch)).abs().max() < 1e-5


def test_pulses_by_dom(batch):
    pulses, counts = pulses_by_dom(batch)
    m, mask = batch["metadata"], batch["dom_mask"]
    assert torch.equal(counts, torch.bincount(m["global_dom_ids"][mask]))
    assert torch.equal(pulses[:, 2].long(), m["sensor_ids"].repeat_interleave(counts))
    dom = torch.arange(len(counts)).repeat_interleave(counts)
    assert (pulses[:, 0].diff() >= 0)[dom.diff() == 0].all()


def test_chunk_lengths():
    assert chunk_lengths(torch.tensor([1, 4, 9, 5]), 4).tolist() == [1, 4, 4, 4, 1, 4, 1]
    assert chunk_lengths(torch.tensor([1, 4]), 4).tolist() == [1, 4]
    assert chunk_lengths(torch.tensor([8]), 4).tolist() == [4, 4]


@pytest.mark.parametrize("ids, rows", [
    ([[0, 0], [1, 2]], 1),
    ([[1, 2], [0, 0]], 2),
    ([[1, 2], [3, -1], [-1, -1]], 0),
    ([[0, 1, -1, -1]], 0)])
def test_rows_with_layers(ids, rows):
    assert rows_with_layers(torch.tensor(ids)) == rows


def test_pad_rows():
    "20 numbers of rows up to 512."
    assert pad_rows(torch.ones(5, 2), -1).sum(1).tolist() == [2] * 5 + [-2] * 3
    assert len({len(pad_rows(torch.ones(n, 2), -1)) for n in range(1, 513)}) == 20


# T2: events of 1 to 5,160 DOMs (the whole detector)


SIZES = torch.tensor([1, 60, 44, 2, 1, 800, 61, 70, 5160])


@pytest.fixture(scope="module")
def hits():
    "Arguments of T2 by name."
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randperm(5160, generator=generator)[:n].sort().values for n in SIZES])
    D = len(ids)
    time = 10_000 + 1_000 * torch.rand(D, generator=generator).round(decimals=3)
    charge = torch.randint(1, 200, (D,), generator=generator) * 0.025
    return {
        "dom_embeddings": torch.randn(D, 32, generator=generator),
        "dom_ids": ids,
        "dom_to_event_idx": torch.arange(len(SIZES)).repeat_interleave(SIZES),
        "batch_size": len(SIZES),
        "dom_features": torch.stack([time, charge, torch.ones(D)], 1),
    }


@pytest.fixture(scope="module")
def few_hits(hits):
    "The first five events: 1, 60, 44, 2 and 1 DOMs."
    return events_of(hits, [0, 1, 2, 3, 4])


def doms_of(hits, doms, **changes):
    "Some DOMs."
    chosen = {k: v[doms] if isinstance(v, torch.Tensor) else v for k, v in hits.items()}
    return dict(chosen, **changes)


def events_of(hits, events):
    "Some events, numbered anew."
    event = hits["dom_to_event_idx"]
    own = torch.isin(event, torch.tensor(events))
    return doms_of(hits, own, dom_to_event_idx=torch.searchsorted(torch.tensor(events), event[own]),
                   batch_size=len(events))


def make_t2(kernel="auto", **options):
    torch.manual_seed(0)
    model = EventTransformer(48, 2, 2, d_dom=32, kernel=kernel, **options)
    torch.nn.init.normal_(model.confidence[-1].weight, std=0.1)        # zero until it is trained
    return model


@pytest.fixture(scope="module")
def t2():
    return make_t2().eval()


@pytest.fixture(scope="module")
def vectors(t2, hits):
    with torch.no_grad(): return t2.vector(**hits)


def in_precision(hits, dtype):
    return dict(hits, dom_embeddings=hits["dom_embeddings"].to(dtype).requires_grad_())


def vectors_by_definition(t2, hits):
    h = hits
    return vectors_of(t2, h["dom_embeddings"], h["dom_ids"], h["dom_to_event_idx"], h["batch_size"],
                      h["dom_features"])


def test_directions_and_angles(t2, hits):
    with torch.no_grad(): angles, (direction, kappa) = t2(**hits), t2.direction(**hits)
    azimuth, zenith = angles.T
    assert angles.shape == (9, 2)
    assert ((azimuth >= 0) & (azimuth < 2 * math.pi) & (zenith >= 0) & (zenith <= math.pi)).all()
    assert torch.allclose(direction.norm(dim=1), torch.ones(9))
    assert (kappa > 0).all()
    assert torch.allclose(angles_to_vector(azimuth, zenith), direction, atol=1e-5)


@pytest.mark.parametrize("kernel", ["grouped", "dense"])
def test_t2_agrees_with_its_definition(few_hits, kernel):
    "Values and gradients."
    model, precise = make_t2(kernel), in_float64(make_t2(kernel))
    hits, precise_hits = in_precision(few_hits, torch.float32), in_precision(few_hits, torch.float64)
    found, expected = model.vector(**hits), vectors_by_definition(precise, precise_hits)
    assert (found.double() - expected).abs().max() < 1e-5
    assert_same_gradients(
        gradients(found, [hits["dom_embeddings"], *trained(model)]),
        gradients(expected, [precise_hits["dom_embeddings"], *trained(precise)]))


@pytest.mark.parametrize("kernel", ["grouped", "dense", "flex"])
def test_t2_without_gradients_agrees_with_its_definition(few_hits, kernel):
    model = make_t2(kernel).eval()
    with torch.no_grad():
        expected = vectors_by_definition(in_float64(model), in_precision(few_hits, torch.float64))
        assert (model.vector(**few_hits).double() - expected).abs().max() < 1e-5


def test_t2_over_the_whole_detector_agrees_with_its_definition(t2, hits, vectors):
    with torch.no_grad():
        expected = vectors_by_definition(in_float64(t2), in_precision(hits, torch.float64))
    assert (vectors.double() - expected).abs().max() < 1e-5


def test_padded_t2_agrees_with_its_definition(few_hits):
    model = make_t2().eval()
    metadata = dict(dom_to_event_idx=few_hits["dom_to_event_idx"], event_ids=torch.arange(5),
                    sensor_ids=few_hits["dom_ids"], dom_features=few_hits["dom_features"])
    with torch.no_grad():
        found = padded_t2(model, few_hits["dom_embeddings"], metadata)
        assert (found - model.vector(**few_hits)).abs().max() < 1e-5


def test_every_parameter_of_t2_gets_a_gradient(few_hits):
    model = make_t2()
    model.vector(**few_hits).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained(model))


def test_t2_does_not_depend_on_the_order_of_doms(t2, hits, vectors):
    shuffled = torch.randperm(len(hits["dom_ids"]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): found = t2.vector(**doms_of(hits, shuffled))
    assert torch.allclose(found, vectors, atol=1e-5)


@pytest.mark.parametrize("event", [0, 1, 5])
def test_t2_does_not_depend_on_the_other_events(t2, hits, vectors, event):
    with torch.no_grad(): found = t2.vector(**events_of(hits, [event]))
    assert torch.allclose(found[0], vectors[event], atol=1e-5)


@pytest.mark.parametrize("kernel", ["grouped", "dense", "flex"])
def test_t2_changes_only_the_event_that_changes(few_hits, kernel):
    "Bit for bit."
    model = make_t2(kernel).eval()
    embeddings = few_hits["dom_embeddings"].clone()
    embeddings[few_hits["dom_to_event_idx"] == 2] *= -1
    with torch.no_grad():
        before = model.vector(**few_hits)
        after = model.vector(**dict(few_hits, dom_embeddings=embeddings))
    others = torch.arange(5) != 2
    assert torch.equal(after[others], before[others])
    assert not torch.allclose(after[2], before[2])


def test_t2_does_not_depend_on_the_clock(t2, hits, vectors):
    later = hits["dom_features"] + torch.tensor([2_048.0, 0, 0])
    with torch.no_grad(): found = t2.vector(**dict(hits, dom_features=later))
    assert torch.allclose(found, vectors, atol=1e-5)


def test_t2_depends_on_times_charges_and_places(t2, hits, vectors):
    elsewhere = (hits["dom_ids"] + 700) % 5160
    with torch.no_grad():
        assert not torch.allclose(t2.vector(**dict(hits, dom_features=None)), vectors)
        assert not torch.allclose(t2.vector(**dict(hits, dom_ids=elsewhere)), vectors)


def test_event_times_may_be_given(t2, few_hits):
    "Those of a packed batch: other reference times give another result."
    from iceaggr.pulses import event_time_reference
    time, charge = few_hits["dom_features"][:, :2].T
    times = event_time_reference(time, charge, few_hits["dom_to_event_idx"], 5)
    with torch.no_grad():
        expected = t2.vector(**few_hits)
        assert torch.equal(t2.vector(**few_hits, event_times=times), expected)
        assert not torch.allclose(t2.vector(**few_hits, event_times=times + 500), expected)


def test_further_keys_of_a_t2_batch_are_accepted(t2, few_hits):
    with torch.no_grad():
        found = t2(**few_hits, event_ids=torch.arange(5), targets=None)
        assert torch.equal(found, t2(**few_hits))


def test_calibration_scales_kappa_only(few_hits):
    "kappa becomes factor * kappa ** power."
    model = make_t2().eval()
    with torch.no_grad():
        direction, kappa = model.direction(**few_hits)
        model.calibration.copy_(torch.tensor([2.0, 0.5]))
        same_direction, calibrated = model.direction(**few_hits)
    assert torch.allclose(same_direction, direction, atol=1e-6)
    assert torch.allclose(calibrated, 2 * kappa**0.5)


def test_half_precision_keeps_the_positions(t2):
    half = copy.deepcopy(t2).to(torch.bfloat16)
    assert half.sensors.dtype == torch.float32
    assert torch.equal(half.sensors, t2.sensors)
    assert half.embed.weight.dtype == torch.bfloat16


def test_t2_under_autocast_stays_close(t2, hits):
    "The same direction to a few degrees, without training."
    with torch.no_grad():
        expected = t2.direction(**hits)[0]
        with torch.autocast("cpu", torch.bfloat16): direction, kappa = t2.direction(**hits)
    assert kappa.dtype == torch.float32
    angle = torch.rad2deg(torch.arccos((direction * expected).sum(1).clamp(max=1)))
    assert angle.max() < 3


# A budget of DOMs


def test_strongest_doms():
    "The most charge; among equals the earliest, then the lower sensor."
    features = torch.tensor([[10.0, 1, 1], [5, 1, 1], [7, 9, 3], [1, 1, 1], [1, 1, 1], [99, 3, 1]])
    ids, event = torch.tensor([1, 2, 3, 9, 4, 5]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert strongest_doms(features, ids, event, 2).tolist() == [1, 2, 4, 5]


def test_budget_warns_and_leaves_out_the_weakest(hits, vectors):
    model = make_t2(max_doms=50).eval()
    with pytest.warns(UserWarning, match="5901 DOMs of 5 events left out") as caught, torch.no_grad():
        found = model.vector(**hits)
    assert caught[0].filename == __file__
    within = [0, 2, 3, 4]
    assert torch.allclose(found[within], vectors[within], atol=1e-5)
    assert not torch.allclose(found[1], vectors[1])


@pytest.mark.parametrize("kernel", ["grouped", "dense"])
def test_doms_beyond_the_budget_do_not_reach_the_tokens(few_hits, kernel):
    "Only what the tokens are measured from depends on them."
    model = make_t2(kernel, max_doms=50).eval()
    h = few_hits
    keep = strongest_doms(h["dom_features"], h["dom_ids"], h["dom_to_event_idx"], 50)
    embeddings = torch.full_like(h["dom_embeddings"], 1e3)
    embeddings[keep] = h["dom_embeddings"][keep]
    assert len(keep) == len(embeddings) - 10
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        assert torch.equal(model.vector(**dict(h, dom_embeddings=embeddings)), model.vector(**h))


def test_no_warning_within_the_budget(few_hits):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        make_t2(max_doms=60).vector(**few_hits)


# Errors


@pytest.mark.parametrize("change, message", [
    (dict(dom_ids=lambda h: h["dom_ids"] + 1), "sensor 5160 is not in the model's geometry of 5160 sensors"),
    (dict(dom_ids=lambda h: h["dom_ids"] - 1), "sensor -1 is not"),
    (dict(batch_size=lambda h: 8), r"0 to batch_size - 1 = 7"),
    (dict(batch_size=lambda h: 10), "event 9 of the batch has no DOMs"),
    (dict(batch_size=lambda h: 0), "at least one event"),
    (dict(dom_to_event_idx=lambda h: h["dom_to_event_idx"] - 1), "must lie in 0 to"),
    (dict(dom_features=lambda h: h["dom_features"][:5]), r"one row per DOM; got .* dom_features \(5, 3\)"),
    (dict(dom_features=lambda h: h["dom_features"][:, :2]), "one row per DOM"),
    (dict(dom_embeddings=lambda h: h["dom_embeddings"][:5]), "got embeddings 5, dom_ids 6199"),
    (dict(dom_to_event_idx=lambda h: h["dom_to_event_idx"][:5]), "one row per DOM.* dom_to_event_idx 5"),
    (dict(dom_embeddings=lambda h: h["dom_embeddings"][:, :8]), r"shape \(6199, 32\); got \(6199, 8\)"),
])
def test_wrong_arguments_of_t2_are_named(t2, hits, change, message):
    wrong = dict(hits, **{name: function(hits) for name, function in change.items()})
    with pytest.raises(ValueError, match=message): t2(**wrong)


def test_t2_without_doms(t2):
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one DOM"): t2(torch.zeros(0, 32), none, none, 1)


def test_budget_needs_features(hits):
    with pytest.raises(ValueError, match="5160 DOMs, more than max_doms=50: choosing .* needs dom_features"):
        make_t2(max_doms=50).vector(**dict(hits, dom_features=None))


@pytest.mark.parametrize("model", [DOMTransformer, EventTransformer])
def test_unknown_kernels_are_named(model):
    message = "unknown kernel 'fast': choose one of auto, grouped, flex, dense"
    with pytest.raises(ValueError, match=message): model(32, 2, 1, kernel="fast")


def test_budget_must_be_positive():
    with pytest.raises(ValueError, match="max_doms must be at least 1; got 0"): make_t2(max_doms=0)


def test_options_show_in_the_printed_model(t1, t2):
    assert "max_seq_len=512, kernel='auto'" in repr(t1)
    assert "n_queries=4" in repr(t1)
    assert "max_doms=5160, sensors=5160, kernel='auto'" in repr(t2)
