"""Training: the optimiser, gradients in slices, targets, calibration, choices of files, failing runs."""
import contextlib
import dataclasses
import functools
import math
import warnings
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_tiny
from definitions import trained
from torch import nn

from iceaggr.augmentation import grid_motions, moved_detector
from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, vmf_loss, vmf_quantile
from iceaggr.engine.loading import held_out_events, packed_batch
from iceaggr.geometry import Geometry
from iceaggr.model import HierarchicalTransformer
from iceaggr.packing import split_batch
from iceaggr.training import (
    LiveCurves,
    MuonAdamW,
    TrainSettings,
    _build_model,
    _coverage_power,
    _coverage_scale,
    _in_notebook,
    _lr_factor,
    _replace_targets,
    _shares_of_cores,
    _SlowSteps,
    _start_from,
    _update_average,
    choose_batches,
    fit,
    loss_backward,
    predict_with_truth,
    train,
    train_step,
    validate,
)

TINY = dict(dom_d_model=32, dom_heads=2, dom_layers=1, event_d_model=32, event_heads=2, event_layers=1)
SETTINGS = TrainSettings(epochs=3, batch_size=16, valid_events=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("data") / "tiny", {1: 160, 2: 50})


@pytest.fixture(scope="module")
def events(data):
    return IceCubeDataset(data, batch_ids=[1])


def test_schedule():
    "Linear up, cosine down to a hundredth, constant after the end."
    x = np.linspace(0, 1, 1001)
    y = np.array([_lr_factor(p, 0.1) for p in x])
    assert y[0] == 0.01 and abs(y.max() - 1) < 1e-6 and x[y.argmax()] == 0.1 and abs(y[-1] - 0.01) < 1e-9
    assert (np.diff(y[101:]) < 0).all() and _lr_factor(1.2) == _lr_factor(1.0)


def test_muon_moves_matrices_and_adamw_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 3))
    optimizer, before = MuonAdamW(model, 1e-3), [p.detach().clone() for p in model.parameters()]
    for p in model.parameters(): p.grad = torch.randn_like(p)
    optimizer.step()
    step = (before[0] - model[0].weight.detach()) / 1e-3
    singular = torch.linalg.svdvals(step / (0.2 * 48**0.5))
    assert singular.min() > 0.6 and singular.max() < 1.2                   # orthogonal, within bfloat16
    assert 0.1 < float(step.square().mean().sqrt()) < 0.3                  # the size of AdamW's steps
    for a, b in zip(before[1:], list(model.parameters())[1:], strict=True):            # AdamW's first step
        assert torch.allclose((a - b.detach()).abs(), torch.full_like(a, 1e-3 / 3), rtol=0.05)


def test_optimiser_state_is_restored():
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 3))
    optimizer = MuonAdamW(model, 1e-3)
    for p in model.parameters(): p.grad = torch.randn_like(p)
    optimizer.step()
    again = MuonAdamW(model, 1e-3)
    again.load_state_dict(optimizer.state_dict())
    one, two = (o.muon.state[model[0].weight]["momentum_buffer"] for o in (optimizer, again))
    assert torch.equal(one, two)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_moving_average():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = {n: (0.9 * p + 0.1 * dict(b.named_parameters())[n]).detach() for n, p in a.named_parameters()}
    _update_average(a, b, 10_000, 0.9)
    assert all(torch.allclose(p, expected[n]) for n, p in a.named_parameters())
    _update_average(a, b, 0, 0.9)
    assert not torch.allclose(a.weight, b.weight)


def test_calibration_finds_factor_and_power():
    "Errors drawn from the law have a factor and a power of 1; altered kappas are restored."
    rng = np.random.default_rng(0)
    kappa = torch.from_numpy(10 ** rng.uniform(0, 3, 40_000))
    error = vmf_quantile(kappa, torch.from_numpy(rng.random(len(kappa))))
    assert abs(_coverage_scale(error, kappa) - 1) < 0.04
    scale = _coverage_scale(error, kappa * 1.5)
    assert abs(scale * 1.5 - 1) < 0.04
    inside = (error <= vmf_quantile(kappa * 1.5 * scale, 0.68)).double().mean()
    assert abs(float(inside) - 0.68) < 1e-3
    assert abs(_coverage_power(error, kappa) - 1) < 0.02
    assert abs(_coverage_power(error, 3 * kappa ** 1.25) * 1.25 - 1) < 0.02
    assert _coverage_power(error, torch.full_like(kappa, 30.)) == 1


def gradients(model, compute):
    "Loss, the next random number, and gradients."
    model.zero_grad()
    torch.manual_seed(1)
    loss = compute()
    return float(loss.detach()), torch.rand(1), [p.grad.clone() for p in trained(model)]


@pytest.mark.parametrize("dropout, kernel, sequences, L, threads", [
    (0., "auto", 1, 128, 1), (0.3, "auto", 1, 128, 1), (0.3, "auto", 8, 128, 2), (0.3, "dense", 20, 32, 1)])
def test_sliced_gradients_are_the_plain_ones(events, dropout, kernel, sequences, L, threads):
    "In float64 to twelve digits, with the same dropout, in grouped and packed layouts, with threads."
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = HierarchicalTransformer(dict(TINY, dropout=dropout), events.geometry).double()
    model.t1.kernel = kernel
    batch = packed_batch(events, range(160), L)
    parts = list(split_batch(batch, sequences))

    def plain():
        "The same slices, with all their graphs."
        embeddings = None
        if dropout: embeddings = torch.cat([model.t1(p, len(p["packed_sequences"]))[0] for p in parts])
        vector = model.t2.vector(**model.t2_batch(batch, embeddings))
        loss = vmf_loss(vector, angles_to_vector(*batch["metadata"]["targets"].T), reduction="sum")
        (loss / 64).backward()
        return loss

    settings = TrainSettings(graph_pulses=2 * sequences * L)
    a, next_a, gradients_a = gradients(model, plain)
    b, next_b, gradients_b = gradients(model, lambda: loss_backward(model, batch, settings))
    torch.set_num_threads(before)
    assert len(parts) > 1 and abs(a - b) < 1e-11 * abs(a) and torch.equal(next_a, next_b)
    for x, y in zip(gradients_a, gradients_b, strict=True): assert (x - y).norm() <= 1e-12 * x.norm()


def blurred(event_ids, truth):
    "Mean of the truth and of a direction that depends on the event."
    other = torch.stack([torch.cos(event_ids * 1.), torch.sin(event_ids * 1.), torch.zeros(len(truth))], 1)
    return 0.6 * truth + 0.4 * other.to(truth)


@pytest.mark.parametrize("motion, pulses", [(0, None), (-1, 1_000)])
def test_targets_give_the_mean_of_the_losses(events, motion, pulses):
    "Whatever the motion of the detector, and however the batch is cut."
    model = HierarchicalTransformer(TINY, events.geometry).double()
    batch = packed_batch(events, range(3, 40), 128)
    motions, point = grid_motions(events.geometry)

    def loss_of(targets):
        def compute():
            replaced = _replace_targets(batch, targets)
            with moved_detector(model.t2, replaced, motions[motion], point) as moved:
                return loss_backward(model, moved, TrainSettings(graph_pulses=pulses))
        return gradients(model, compute)

    def other_alone(event_ids, truth): return (blurred(event_ids, truth) - 0.6 * truth) / 0.4

    mean, truth, other = (loss_of(t) for t in (blurred, lambda event_ids, truth: truth, other_alone))
    assert abs(mean[0] - 0.6 * truth[0] - 0.4 * other[0]) < 1e-4 * abs(mean[0])
    for x, y, z in zip(mean[2], truth[2], other[2], strict=True):
        assert (x - 0.6 * y - 0.4 * z).norm() <= 1e-4 * x.norm() + 1e-6


def test_wrong_targets_are_refused(events):
    batch = packed_batch(events, range(4))
    with pytest.raises(ValueError, match="one vector per event"): _replace_targets(batch, lambda i, x: x[:2])
    with pytest.raises(ValueError, match="length 2 for event"): _replace_targets(batch, lambda i, x: 2 * x)


def test_a_resume_keeps_to_its_targets(data, tmp_path):
    "The truth as a function gives the weights of the truth; other targets give others; a resume compares."
    settings = TrainSettings(epochs=1, batch_size=16, valid_events=20)
    common = dict(device="cpu", progress=False)

    def run(name, **more):
        train(data, tmp_path / name, TINY, [1], [2], settings, **common, **more)
        return HierarchicalTransformer.load(tmp_path / name).t2.embed.weight

    plain, same, other = run("plain"), run("same", targets=lambda i, x: x), run("other", targets=blurred)
    assert (plain - same).norm() < 0.1 * (plain - other).norm()
    run("other", targets=blurred, resume=True)
    with pytest.raises(ValueError, match="targets_checksum"): run("other", resume=True)


class Variant(HierarchicalTransformer):
    "A model of its own size."
    def __init__(self, settings=None, geometry=None):
        super().__init__(settings or dict(TINY, event_d_model=48), geometry)


def test_a_model_or_its_class_is_trained(data, tmp_path):
    settings = TrainSettings(epochs=1, batch_size=32, valid_events=20)
    train(data, tmp_path / "class", Variant, [1], [2], settings, device="cpu", progress=False)
    assert Variant.load(tmp_path / "class").settings.event_d_model == 48
    model = HierarchicalTransformer(TINY, IceCubeDataset(data).geometry)
    train(data, tmp_path / "model", model, [1], [2], settings, device="cpu", progress=False)
    assert HierarchicalTransformer.load(tmp_path / "model").settings == model.settings
    moved = Geometry(IceCubeDataset(data).geometry.xyz + 5)
    with pytest.raises(ValueError, match="lie up to 8.7 m"): _build_model(model, moved)


def test_a_run_stores_its_best_epoch(data, events, tmp_path):
    valid, lengths = IceCubeDataset(data, batch_ids=[2]), []
    def count(log): lengths.append(len(log))
    torch.manual_seed(0)
    model = HierarchicalTransformer(TINY, events.geometry)
    log = fit(model, events, valid, tmp_path, SETTINGS, progress=False, on_epoch=count)
    names = ["best.safetensors", "last.safetensors", "log.csv", "state.previous.pt", "state.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names and lengths == [1, 2, 3]
    stored, held_out = HierarchicalTransformer.load(tmp_path), held_out_events(events, 10)
    best = log.loc[log.held_out_mean_degrees.idxmin()]
    assert abs(validate(stored, valid)["mean_degrees"] - best.valid_mean_degrees) < 1e-3
    assert abs(validate(stored, events, held_out)["mean_degrees"] - best.held_out_mean_degrees) < 1e-3
    assert pd.read_csv(tmp_path / "log.csv").step.tolist() == log.step.tolist()


def test_calibration_of_a_run(data, tmp_path):
    "68 % of the held-out events lie in their cones, to two events, where there are at least fifty."
    ds = IceCubeDataset(data, batch_ids=[1])
    settings = dataclasses.replace(SETTINGS, epochs=1, held_out=3)
    model = HierarchicalTransformer(TINY, ds.geometry)
    fit(model, ds, IceCubeDataset(data, batch_ids=[2]), tmp_path, settings, progress=False)
    stored, held_out = HierarchicalTransformer.load(tmp_path), held_out_events(ds, 3)[-50:]
    error, kappa, _ = predict_with_truth(stored, ds, held_out)
    share = float((error <= vmf_quantile(kappa, 0.68)).double().mean())
    assert abs(share - 0.68) <= 2.5 / len(held_out) and stored.t2.calibration[0] != 1


def test_a_step_that_is_not_finite_is_skipped(data, tmp_path, capsys):
    "It is named and counted; ten in a row stop the run."
    ds, valid = IceCubeDataset(data, batch_ids=[1]), IceCubeDataset(data, batch_ids=[2])
    ds.targets = ds.targets.copy()
    ds.targets[3] = np.nan
    model = HierarchicalTransformer(TINY, ds.geometry)
    log = fit(model, ds, valid, tmp_path, dataclasses.replace(SETTINGS, epochs=1), progress=False)
    assert all(p.isfinite().all() for p in model.parameters()) and np.isfinite(log.train_loss).all()
    skipped = pd.read_csv(tmp_path / "skipped_steps.csv", dtype=str)
    assert log.skipped_steps.tolist() == [1] and len(skipped) == 1
    assert str(ds.event_ids[3]) in skipped.event_ids[0].split()
    capsys.readouterr()
    ds.targets[:] = np.nan
    with pytest.raises(FloatingPointError, match="ten steps in a row"):
        fit(model, ds, valid, tmp_path, dataclasses.replace(SETTINGS, epochs=9), progress=False)
    assert capsys.readouterr().out.count("step skipped") == 10
    assert len(pd.read_csv(tmp_path / "skipped_steps.csv")) == 10


def test_steps_that_become_slow_are_warned_of_once():
    watch = _SlowSteps(first=20, last=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(60): watch.add(1e-5 * (1 + k % 3))            # and some that take longer now and then
        for _ in range(2): watch.add(1.)
    with pytest.warns(UserWarning, match="100 times as long .* OMP_NUM_THREADS=1"):
        for _ in range(3): watch.add(2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(9): watch.add(2e-3)


def test_a_run_that_learnt_nothing_has_no_best_weights(data, tmp_path):
    "The weights of its start are finite and would look like a result."
    ds, valid = IceCubeDataset(data, batch_ids=[1]), IceCubeDataset(data, batch_ids=[2])
    ds.targets = np.full_like(ds.targets, np.nan)
    model = HierarchicalTransformer(TINY, ds.geometry)
    settings = dataclasses.replace(SETTINGS, epochs=2, batch_size=100)
    with pytest.raises(FloatingPointError, match="no best weights"):
        fit(model, ds, valid, tmp_path, settings, progress=False)
    assert not (tmp_path / "best.safetensors").exists() and len(pd.read_csv(tmp_path / "log.csv")) == 2
    with pytest.raises(FloatingPointError, match="no best weights"):
        fit(model, ds, valid, tmp_path, settings, progress=False, resume=True)


@pytest.mark.parametrize("chosen, word", [
    (([1], [1]), "both"), (([99], None), r"\[99\]"), (([1, 2], None), "no file is left")])
def test_wrong_files_are_refused(data, chosen, word):
    with pytest.raises(DataError, match=word): choose_batches(data, *chosen)


def test_default_files(data): assert choose_batches(data, None, None) == ([1], [2])


@pytest.mark.parametrize("wrong", [
    dict(precision="float16"), dict(batch_size=0), dict(minutes=-1.), dict(minutes=math.nan),
    dict(held_out=1)])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))): TrainSettings(**wrong)


def test_start_from_other_weights(events, tmp_path):
    path = tmp_path / "weights.safetensors"
    model, other = (HierarchicalTransformer("small", events.geometry) for _ in range(2))
    model.save(path)
    _start_from(other, path)
    weights = model.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in other.state_dict().items())
    with pytest.raises(ValueError, match="--preset small"):
        _start_from(HierarchicalTransformer(TINY, events.geometry), path)
    with pytest.raises(ValueError, match="lie up to 8.7 m"):
        _start_from(HierarchicalTransformer("small", Geometry(events.geometry.xyz + 5)), path)
    with pytest.raises(FileNotFoundError, match="no weights"): _start_from(other, "nothing of that name")


class MaxPool(nn.Module):
    "A pooling with weights of its own."
    def __init__(self, d_model):
        super().__init__()
        self.mix = nn.Linear(d_model, d_model)

    def forward(self, x, segments): return self.mix(segments.reduce(x, "max"))


def test_start_from_another_pooling(events, tmp_path):
    "The class is not needed; a model of other settings or layers is refused in one line that names them."
    path = tmp_path / "weights.safetensors"
    exchanged = functools.partial(HierarchicalTransformer, pool=MaxPool)
    exchanged(TINY, events.geometry).save(path)
    _start_from(exchanged(TINY, events.geometry), path)
    with pytest.raises(ValueError, match=r"\(pool attention instead of mean\): give") as other_settings:
        _start_from(HierarchicalTransformer(dict(TINY, pool="mean"), events.geometry), path)
    with pytest.raises(ValueError, match=r"differ in t1.pool.*\): give .* pooling$") as other_layers:
        _start_from(HierarchicalTransformer(TINY, events.geometry), path)
    for error in (other_settings, other_layers): assert "\n" not in str(error.value)


def test_start_from_a_pooling_with_the_same_tensors(events, tmp_path):
    "Tensors of equal names and shapes do not make it the same pooling."
    class OtherPool(MaxPool): pass

    path = tmp_path / "weights.safetensors"
    HierarchicalTransformer(TINY, events.geometry, pool=MaxPool).save(path)
    with pytest.raises(ValueError, match="pooling is MaxPool, not OtherPool: give weights"):
        _start_from(HierarchicalTransformer(TINY, events.geometry, pool=OtherPool), path)


def test_live_curves_are_one_figure():
    "Drawn three times in the same place."
    rows = dict(minutes=[1, 2, 3], train_loss=[3, 2, 1], held_out_loss=[3, 2, 1], valid_loss=[3, 2, 1],
                valid_mean_degrees=[9, 8, 7], valid_median_degrees=[9, 8, 7])
    log, curves = pd.DataFrame(rows), LiveCurves()
    with mock.patch("IPython.display.display") as display:
        for n in (1, 2, 3): curves(log[:n])
    display.assert_called_once()
    assert display.call_args.kwargs == dict(display_id=True)
    assert display.call_args.args[0].data[:4] == b"\x89PNG"
    assert display.return_value.update.call_count == 2


def test_in_notebook():
    with mock.patch("IPython.get_ipython", return_value=None): assert not _in_notebook()
    kernel = mock.Mock(kernel=object())
    with mock.patch("IPython.get_ipython", return_value=kernel): assert _in_notebook()


@pytest.fixture
def model(events):
    torch.manual_seed(0)
    return HierarchicalTransformer(TINY, events.geometry)


@contextlib.contextmanager
def threads(n):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try: yield
    finally: torch.set_num_threads(before)


@pytest.mark.parametrize("resultants", [False, True])
@pytest.mark.parametrize("graph_pulses", [None, 1_000])
def test_shares_of_cores_give_the_plain_gradients(model, events, resultants, graph_pulses):
    "In float64; also in slices, with targets of any length, and where gradients were there before."
    settings = TrainSettings(batch_size=24, graph_pulses=graph_pulses)
    batch = packed_batch(events, range(24), 128)
    if resultants: batch["metadata"]["resultants"] = torch.linspace(0.5, 1, 24)
    model = model.double()
    def compute():
        loss_backward(model, batch, settings)
        return loss_backward(model, batch, settings)
    with threads(1): one, _, expected = gradients(model, compute)
    with threads(2):
        assert len(_shares_of_cores(model, batch)) == 2
        two, _, found = gradients(model, compute)
    assert two == pytest.approx(one, rel=1e-6)
    for a, b in zip(found, expected, strict=True): assert (a - b).norm() <= 1e-6 * b.norm()


def test_shares_follow_the_model(model, events):
    "Steps change its weights, and a moved detector its buffers."
    batch, settings = packed_batch(events, range(24), 128), TrainSettings(batch_size=24)
    with threads(2):
        for _ in range(3): train_step(model, MuonAdamW(model, 1e-2), batch, settings, 1e-2)
        model.t2.sensors = model.t2.sensors + 1
        shared = loss_backward(model, batch, settings)
    model.zero_grad()
    with threads(1): assert loss_backward(model, batch, settings) == pytest.approx(float(shared), rel=1e-5)


def test_an_event_with_most_of_the_pulses_is_not_shared_out(model, events):
    batch = packed_batch(events, range(24), 128)
    batch["metadata"]["dom_features"][batch["metadata"]["dom_to_event_idx"] == 5, 2] += 10_000
    with threads(2): assert _shares_of_cores(model, batch) == [batch]
