"""A training step of fixed shapes: no host reads, no graph breaks, the same result as without padding."""
import copy
import dataclasses
import functools
import math
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from definitions import trained
from processes import ended, launch
from scipy.stats import ks_2samp
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import flex_attention as flex

from iceaggr import attention, training
from iceaggr.augmentation import draw_random, perturb, perturb_padded
from iceaggr.data import IceCubeDataset
from iceaggr.engine import distributed
from iceaggr.engine.budget import Budget, choose_budgets, pad_batch, pad_to_smallest, size_of
from iceaggr.engine.device_steps import DeviceStep
from iceaggr.engine.loading import packed_batch
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.pooling import MeanPool
from iceaggr.testing import write_tiny
from iceaggr.training import MuonAdamW, TrainSettings, _batch_loss, _update_average, train_step
from iceaggr.yardsticks import OperationCounter

SMALL = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)


@pytest.fixture
def events(tiny_dataset):
    return list(IceCubeDataset(tiny_dataset))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return HierarchicalTransformer(SMALL)


def test_counter_finds_the_host_reads_of_a_plain_step(events, model):
    "The packed path on a batch of any shape reads lengths and checks on the host."
    model.t1.kernel = model.t2.kernel = "dense"
    batch, settings = collate_dom_packing(events), TrainSettings(batch_size=len(events))
    with OperationCounter() as counter: train_step(model, MuonAdamW(model, 1e-3), batch, settings, 1e-3)
    assert counter.operations["aten.nonzero.default"] == counter.host_reads["aten.nonzero.default"] == 1
    assert counter.host_reads["aten._local_scalar_dense.default"] > 4
    assert counter.host_reads["aten.bincount.default"] == 2


@pytest.fixture
def batch(events):
    return collate_dom_packing(events, 128)


def padded_by(batch, rows=2, doms=40, n_events=3):
    "The batch with so many more sequences, DOMs and events."
    size = size_of(batch)
    budget = Budget(size.rows + rows, size.layer_rows + 1, size.doms + doms, size.events + n_events)
    return pad_batch(batch, budget)


def loss_and_gradients(model, batch, kernel):
    "Summed loss and the gradients of all parameters."
    model.t1.kernel = model.t2.kernel = kernel
    loss = _batch_loss(model.vector(batch), batch)
    return loss.detach(), torch.autograd.grad(loss, trained(model))


@pytest.mark.parametrize("pool", [None, MeanPool])
def test_padding_changes_nothing(batch, pool):
    "Vectors, loss and gradients, against the path without padding, in float64."
    torch.manual_seed(0)
    model = HierarchicalTransformer(SMALL, pool=pool).double()
    padded = padded_by(batch)
    expected, found = model.vector(batch), model.vector(padded)
    assert torch.allclose(found[:len(expected)], expected, rtol=1e-9, atol=1e-9)
    loss, gradients = loss_and_gradients(model, batch, "grouped")
    padded_loss, padded_gradients = loss_and_gradients(model, padded, "dense")
    assert abs(loss - padded_loss) < 1e-8 * abs(loss)
    for a, b in zip(gradients, padded_gradients, strict=True):
        assert (a - b).norm() <= 1e-8 * a.norm() + 1e-12


def test_contents_of_the_padding_do_not_matter(batch, model):
    "Other pulses, features and sensors there: the same vectors and gradients bit for bit."
    padded = padded_by(batch)
    other = copy.deepcopy(padded)
    m, doms, cells = other["metadata"], ~other["metadata"]["real_doms"], ~other["dom_mask"]
    other["packed_sequences"][cells] = torch.rand(int(cells.sum()), 4) * 9_000
    m["dom_features"][doms] = torch.rand(int(doms.sum()), 3) * 9_000 + 1
    m["sensor_ids"][doms] = torch.randint(0, 5_160, (int(doms.sum()),))
    m["targets"][~m["real_events"]] = 1.
    (loss, gradients), (other_loss, others) = (loss_and_gradients(model, b, "dense") for b in (padded, other))
    assert torch.equal(loss, other_loss)
    assert all(map(torch.equal, gradients, others))


def test_batches_that_do_not_fit_are_refused(events, batch):
    size = size_of(batch)
    with pytest.raises(ValueError, match="does not fit"): pad_batch(batch, size)
    part = next(split_batch(collate_dom_packing(events, 16), 1))
    with pytest.raises(ValueError, match="parts of events"): padded_by(part)


def test_every_batch_fits_one_of_three_sizes():
    "The sizes hold every batch of the sample, are ascending, and pad less than one size for all."
    rng = np.random.default_rng(0)
    rows = rng.lognormal(3, 0.7, 200).astype(int) + 1
    sizes = [Budget(int(n), int(n) // 2 + 1, int(n) * 300, 64) for n in rows]
    budgets = choose_budgets(sizes)
    assert 1 < len(budgets) <= 3 and all(b.holds(a) for a, b in zip(sizes, [budgets[-1]] * 200, strict=True))
    padded = sum(min(b.rows for b in budgets if b.holds(s)) for s in sizes)
    assert padded < 0.6 * 200 * budgets[-1].rows
    assert padded < 1.9 * rows.sum()


def device_step(model, n_events, average=None, **options):
    "A step of a model on batches of so many events, and the moving average."
    average = average or copy.deepcopy(model)
    def loss(batch, random=None):
        if random is not None: batch = perturb_padded(batch, random)
        return _batch_loss(model.vector(batch), batch)
    optimizer = MuonAdamW(model, 1e-3)
    return DeviceStep(model, average, optimizer, loss, n_events, 1., **options), average, optimizer


def masked_attention(q, k, v, block_mask):
    "What FlexAttention does, from the mask function: it cannot run on fake tensors, or backward on a CPU."
    query, key = torch.meshgrid(torch.arange(q.shape[2]), torch.arange(q.shape[2]), indexing="ij")
    mask = torch.stack([block_mask.mask_mod(b, 0, query, key) for b in range(len(q))])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


def fake_step(batch, pad):
    "A step on fake tensors, which hold no data; `pad` makes the batch of fixed size, or not."
    batch = padded_by(batch) if pad else batch
    with FakeTensorMode(allow_non_fake_inputs=False) as mode, \
            mock.patch.object(attention, "flex_attention", masked_attention):
        def fake(x): return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
        model = HierarchicalTransformer(SMALL)
        model.t1.kernel = model.t2.kernel = "flex"
        fakes = {k: fake(v) for k, v in batch.items() if k != "metadata"}
        fakes["metadata"] = {k: fake(v) for k, v in batch["metadata"].items()}
        step, _, _ = device_step(model, 8, HierarchicalTransformer(SMALL))
        random = [draw_random(fakes, None)] if pad else []
        step(1e-3, 1e-3, fakes, *random)
        return step.results


def test_no_host_read_in_a_whole_step(batch):
    "Augmentation, forward with FlexAttention's masks, loss, backward, clipping, guard, optimisers, average."
    result, = fake_step(batch, pad=True)
    assert result.shape == (2,)
    with pytest.raises(DataDependentOutputException): result.tolist()


def test_fake_tensors_find_host_reads(batch):
    "The same on a batch without padding, which the step must count."
    found = DataDependentOutputException, DynamicOutputShapeException
    with pytest.raises(found): fake_step(batch, pad=False)


def test_path_of_cuda_compiles_without_a_break(batch, model):
    "FlexAttention in the graph, forward and backward; `fullgraph` turns any break into an error."
    model.t1.kernel = model.t2.kernel = "flex"
    torch._dynamo.reset()
    plain, _, _ = device_step(copy.deepcopy(model), 8)
    with mock.patch.object(flex, "_validate_device", lambda q, k, v: None):       # refuses CPUs
        step, _, _ = device_step(model, 8, backend="aot_eager")
        torch._dynamo.utils.counters.clear()
        padded = padded_by(batch)
        for i in range(2): step(1e-3, 1e-3, padded, draw_random(padded, generator(i)))
    losses = step.read()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2        # loss and update
    assert not torch._dynamo.utils.counters["graph_break"]
    expected, _, _ = device_step(new_model("dense"), 8)
    for i in range(2): expected(1e-3, 1e-3, padded, draw_random(padded, generator(i)))
    assert np.allclose(losses, expected.read(), rtol=1e-5)


def new_model(kernel="dense", settings=SMALL):
    torch.manual_seed(0)
    model = HierarchicalTransformer(settings)
    model.t1.kernel = model.t2.kernel = kernel
    return model


def test_operations_of_a_step_are_bounded(batch):
    "The preset `small`, counted without a compiler: a plain step takes 2,100, and waits 53 times."
    step, _, _ = device_step(new_model(settings="small"), 8)
    padded = padded_by(batch)
    with OperationCounter() as counter: step(1e-3, 1e-3, padded)
    assert not counter.host_reads
    assert counter.operations.total() < 1_600
    with OperationCounter() as counter: step(1e-3, 1e-3, padded, draw_random(padded, generator(0)))
    assert counter.host_reads.total() <= 1                     # a CPU's own way to sort; see the fake step
    assert not any("lift_fresh" in name for name in counter.operations)       # constants travel from the host
    assert counter.operations.total() < 1_720


def test_twenty_steps_compiled_and_eager(events):
    "The same losses and weights, on two sizes of batch that take turns; no graph beyond one for each."
    torch._dynamo.reset()
    batches = [padded_by(collate_dom_packing(some, 128)) for some in (events, events[:5])]
    found = []
    for backend in (None, "aot_eager"):
        model = new_model()
        step, average, _ = device_step(model, 8, backend=backend)
        torch._dynamo.utils.counters.clear()
        for i in range(20): step(3e-3, 0.1, batches[i % 2])
        found.append((step.read(), [*model.parameters(), *average.parameters()]))
    (eager, weights), (compiled, others) = found
    assert np.allclose(eager, compiled, rtol=1e-5) and eager[-2] < eager[0]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    for a, b in zip(weights, others, strict=True): assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(batch):
    "Weights, average and state of the optimisers stay bit for bit; the next step counts again."
    model = new_model()
    step, average, optimizer = device_step(model, 8)
    good, bad = padded_by(batch), padded_by(batch)
    bad["metadata"]["targets"][2] = math.nan
    step(1e-3, 0.1, good)
    def everything():
        states = [s for part in (optimizer.muon, optimizer.adamw) for s in part.state.values()]
        tensors = [*model.parameters(), *average.parameters(), *(x for s in states for x in s.values())]
        return [x.detach().clone() for x in tensors]
    before = everything()
    step(1e-3, 0.1, bad)
    assert all(map(torch.equal, before, everything()))
    step(1e-3, 0.1, good)
    losses = step.read()
    assert losses[1] is None and losses[0] > losses[2] and step.read() == []


def test_optimisers_are_those_of_torch(model):
    "Ten updates from random gradients; Muon works in bfloat16. The state can be exchanged."
    other = copy.deepcopy(model)
    step, average, optimizer = device_step(model, 1)
    plain, other_average = MuonAdamW(other, 1e-3), copy.deepcopy(other)
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        if i == 5: plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        gradients = [torch.randn(p.shape, generator=generator) for p in trained(model)]
        for p, q, g in zip(trained(model), trained(other), gradients, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.)
        assert norm > 1
        for group in plain.param_groups: group["lr"] = 1e-3 * group["share"]
        plain.step()
        _update_average(other_average, other, 10_000, 0.9)
        step.from_gradients(1e-3, 0.1)
    matrices = {id(p) for group in optimizer.muon.param_groups for p in group["params"]}
    for m, o in ((model, other), (average, other_average)):
        for p, q, own in zip(m.parameters(), o.parameters(), model.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=2e-4 if id(own) in matrices else 1e-6)


RUN = TrainSettings(epochs=2, batch_size=16, valid_events=50, save_minutes=1e9, lr=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 160, 2: 50})


def run_of(data, folder, monkeypatch, settings=RUN, backend=None, **options):
    "A run with steps on the device, on a CPU: the log, and the weights at its end."
    folder.mkdir(exist_ok=True)
    steps = functools.partial(training._DeviceSteps, backend=backend)
    monkeypatch.setattr(training, "_fits_device_steps", lambda job: True)
    monkeypatch.setattr(training, "_DeviceSteps", steps)
    train_ds, valid_ds = (IceCubeDataset(data, batch_ids=[n]) for n in (1, 2))
    model = new_model("auto")
    log = training.fit(model, train_ds, valid_ds, folder, settings, progress=False, **options)
    monkeypatch.undo()
    return log, model


def test_a_run_on_the_device(data, tmp_path, monkeypatch):
    "The losses of a plain run up to Muon's bfloat16, the same count of events; compiled and eager agree."
    log, model = run_of(data, tmp_path / "device", monkeypatch)
    compiled, other = run_of(data, tmp_path / "compiled", monkeypatch, backend="aot_eager")
    plain = new_model("auto")
    (tmp_path / "plain").mkdir()
    train_ds, valid_ds = (IceCubeDataset(data, batch_ids=[n]) for n in (1, 2))
    expected = training.fit(plain, train_ds, valid_ds, tmp_path / "plain", RUN, progress=False)
    assert log.step.tolist() == expected.step.tolist() and (log.skipped_steps == 0).all()
    assert np.allclose(log.train_loss, expected.train_loss, rtol=0.02)
    assert np.allclose(log.train_loss, compiled.train_loss, rtol=1e-5)
    assert torch.equal(model.t2.sensors, plain.t2.sensors)     # the detector is back in its place


def test_a_run_on_the_device_goes_on_exactly(data, tmp_path, monkeypatch):
    "Two epochs at once, and one epoch, then a resume."
    whole, model = run_of(data, tmp_path / "whole", monkeypatch)
    class Enough(Exception): pass

    def enough(log): raise Enough
    with pytest.raises(Enough): run_of(data, tmp_path / "parts", monkeypatch, on_epoch=enough)
    parts, again = run_of(data, tmp_path / "parts", monkeypatch, resume=True)
    assert np.array_equal(whole.train_loss, parts.train_loss)
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_steps_that_are_not_finite_are_named(data, tmp_path, monkeypatch):
    "The same events as in a plain run, though losses are read together, and half the batches fit no size."
    def spoil(event_ids, truth): return torch.where((event_ids % 40 == 3)[:, None], torch.nan, truth)
    settings = dataclasses.replace(RUN, epochs=1, augment=False)
    def half(sizes): return [Budget(1, 1, int(np.median([s.doms for s in sizes])), 24)]
    monkeypatch.setattr(training, "choose_budgets", half)
    log, _ = run_of(data, tmp_path / "device", monkeypatch, settings, targets=spoil)
    monkeypatch.undo()
    (tmp_path / "plain").mkdir()
    train_ds, valid_ds = (IceCubeDataset(data, batch_ids=[n]) for n in (1, 2))
    plain = training.fit(new_model("auto"), train_ds, valid_ds, tmp_path / "plain", settings, progress=False,
                         targets=spoil)
    assert log.skipped_steps.tolist() == plain.skipped_steps.tolist() != [0]
    named = [(tmp_path / name / "skipped_steps.csv").read_text() for name in ("device", "plain")]
    assert named[0] == named[1]


def test_sizes_estimated_for_a_run_hold_its_batches(data):
    "Of all batches of an epoch, from the pulses of their events and a sample of DOMs."
    ds = IceCubeDataset(data, batch_ids=[1])
    model = new_model("auto")
    job = mock.Mock(train_ds=ds, model=model, settings=RUN, state=dict(epoch=0))
    budgets = choose_budgets(training._sizes_of_batches(job))
    for events in training._epoch_batches(job):
        padded = pad_to_smallest(packed_batch(ds, events), budgets)
        assert "real_doms" in padded["metadata"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def sorted_pulses(batch):
    "Pulses by (event, sensor, time), with the number of the event."
    m, mask = batch["metadata"], batch["dom_mask"]
    pulses, event = batch["packed_sequences"][mask], m["dom_to_event_idx"][m["global_dom_ids"][mask]]
    table = torch.cat([event[:, None].float(), pulses], 1).double().numpy()
    return table[np.lexsort((table[:, 2], table[:, 1], table[:, 3], table[:, 0]))]


def test_perturbed_batch_is_that_of_its_pulses(ppc_events):
    "The pulses that stay, packed alone by the CPU: the same tables, vectors and gradients."
    batch = collate_dom_packing(ppc_events[:24], 128)
    perturbed = perturb_padded(padded_by(batch), draw_random(padded_by(batch), generator(3)))
    table = sorted_pulses(perturbed)
    assert 0 < len(table) < int(batch["dom_mask"].sum())
    order = np.lexsort((table[:, 1], table[:, 0]))
    kept = [table[order][table[order][:, 0] == i, 1:] for i in range(24)]
    events = [dict(e, pulse_features=torch.tensor(p).float()) for e, p in zip(ppc_events, kept, strict=False)]
    expected = collate_dom_packing(events, 128)
    m, own, real = expected["metadata"], perturbed["metadata"], perturbed["metadata"]["real_doms"]
    for key in ("sensor_ids", "dom_to_event_idx"): assert torch.equal(own[key][real], m[key])
    assert torch.allclose(own["dom_features"][real], m["dom_features"], rtol=1e-6)
    for key in ("event_times", "event_dom_counts"): assert torch.equal(own[key][:24], m[key])
    model = new_model().double()
    loss, gradients = loss_and_gradients(model, expected, "grouped")
    padded_loss, others = loss_and_gradients(model, perturbed, "dense")
    assert abs(loss - padded_loss) < 1e-6 * abs(loss)
    for a, b in zip(gradients, others, strict=True): assert (a - b).norm() <= 1e-5 * a.norm() + 1e-9


@pytest.fixture(scope="module")
def ppc_events(ppc_root):
    ds = IceCubeDataset(ppc_root, batch_ids=[1], max_events=200)
    return [ds[i] for i in range(64)]


def changes(batch, perturbed):
    "Of one perturbation: shares of DOMs and noise that are left out, by event, and changes of what stays."
    def keyed(b):
        table = sorted_pulses(b)
        return pd.DataFrame(table, columns=["event", "time", "charge", "sensor", "aux"])
    before, after = keyed(batch), keyed(perturbed)
    events = before.event.unique()
    def count(t, n): return t.groupby("event").size().reindex(events, fill_value=0) / n
    noise = count(after[after.aux > 0.5], before[before.aux > 0.5].groupby("event").size()).fillna(1.)
    hits = before.groupby("event").sensor.nunique()
    doms = after.groupby("event").sensor.nunique().reindex(events, fill_value=0) / hits
    both = before.drop_duplicates(["event", "sensor"], keep=False).merge(
        after.drop_duplicates(["event", "sensor"], keep=False), on=["event", "sensor", "aux"])
    lone = both[(both.time_x - both.time_y).abs() < 12]        # the same pulse: other pulses lie further off
    shifts, factors = lone.time_y - lone.time_x, np.log(lone.charge_y / lone.charge_x)
    return dict(noise=noise, doms=doms, shifts=shifts, factors=factors)


def test_perturbations_have_the_distribution_of_the_cpu(ppc_events):
    "Kolmogorov and Smirnov's test of four quantities, over forty epochs of the same events."
    batch = collate_dom_packing(ppc_events)
    fixed = padded_by(batch)
    found = [(changes(batch, perturb(batch, seed=1, epoch=i)),
              changes(batch, perturb_padded(fixed, draw_random(fixed, generator(i))))) for i in range(40)]
    for name in ("noise", "doms", "shifts", "factors"):
        host, device = (np.concatenate([pair[i][name] for pair in found]) for i in (0, 1))
        assert len(host) > 2_000
        assert ks_2samp(host, device).pvalue > 1e-3, name
    assert abs(device.std() - 0.1) < 0.005 and abs(device.mean()) < 0.005


def test_small_events_stay_complete(events):
    "An event that would keep fewer than six pulses keeps all, as on the CPU; the same seed gives the same."
    few = [dict(e, pulse_features=e["pulse_features"][:6]) for e in events]
    fixed = padded_by(collate_dom_packing(few, 128))
    first, same, other = (perturb_padded(fixed, draw_random(fixed, generator(seed))) for seed in (0, 0, 1))
    assert torch.equal(first["dom_mask"].sum(), fixed["dom_mask"].sum())
    assert torch.equal(first["packed_sequences"], same["packed_sequences"])
    assert not torch.equal(first["packed_sequences"], other["packed_sequences"])


def fit_on_device(data, run):
    "Train on the device in double precision, on a CPU, without augmentation."
    training._fits_device_steps = lambda job: True
    training._DeviceSteps = functools.partial(training._DeviceSteps, backend=None)
    with distributed.process_group("cpu"):
        train_ds, valid_ds = (IceCubeDataset(data, batch_ids=[n]) for n in (1, 2))
        model = new_model("auto").double()
        run.mkdir(exist_ok=True)
        settings = dataclasses.replace(RUN, augment=False)
        training.fit(model, train_ds, valid_ds, run, settings, progress=False)


def test_two_processes_on_the_device(data, tmp_path):
    "The weights of one process: all gradients and the loss are one message per step."
    out = tmp_path / "out"
    processes = [launch(out, fit_on_device, data, tmp_path / str(world), world=world) for world in (2, None)]
    assert [ended(p) for p in processes] == [[0, 0], [0]], out.read_text()
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("None", "2"))
    assert one["step"] == two["step"] > 10
    for key, weights in one["model"].items():
        assert torch.allclose(weights, two["model"][key], rtol=0, atol=1e-6), key


@pytest.mark.slow
def test_inductor_compiles_the_step(batch):
    "The compiler that a GPU uses, here for a CPU: augmentation, loss and update; needs a C++ compiler."
    losses, padded = [], padded_by(batch)
    for backend in (None, "inductor"):
        step, _, _ = device_step(new_model(), 8)
        if backend:
            step.loss, step.update = (torch.compile(f, fullgraph=True, dynamic=False)
                                      for f in (step.loss, step.update))
        for i in range(5): step(1e-3, 1e-3, padded, draw_random(padded, generator(i)))
        losses.append(step.read())
    assert np.allclose(*losses, rtol=1e-5)
