"""The model: prediction in any parts and from any table of pulses, gradients, saving and loading."""
import copy
import functools
import json
import math
import sys
import types
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from iceaggr.accumulator import EventAccumulator
from iceaggr.data import IceCubeDataset
from iceaggr.direction import angles_to_vector, vmf_loss
from iceaggr.geometry import Geometry
from iceaggr.model import (
    HierarchicalTransformer,
    ModelSettings,
    model_settings,
    predict_dataset,
    ranges_of_events,
)
from iceaggr.packing import collate_dom_packing, split_batch
from iceaggr.pulses import MAX_CHARGE
from iceaggr.simulation.dataset import demo_dataset
from iceaggr.training import _start_from
from iceaggr.weights import WEIGHTS_VERSION, describe_part, find_model, find_part, import_part, read_file

SETTINGS = ModelSettings(dom_d_model=32, dom_heads=2, dom_layers=1,
                         event_d_model=32, event_heads=2, event_layers=1)


@pytest.fixture(scope="module")
def dataset():
    return IceCubeDataset(demo_dataset(), batch_ids=[1], max_events=100)


@pytest.fixture(scope="module")
def events(dataset):
    return dataset.__getitems__(range(32))


@pytest.fixture(scope="module")
def batch(events):
    return collate_dom_packing(events)


@pytest.fixture(scope="module")
def model(dataset):
    torch.manual_seed(0)
    model = HierarchicalTransformer(SETTINGS, dataset.geometry).eval()
    nn.init.normal_(model.t2.confidence[-1].weight, std=0.1)        # zero until it is trained
    return model


@pytest.fixture(scope="module")
def expected(model, batch):
    "The prediction for the whole batch."
    return model.predict(batch)


@pytest.fixture(scope="module")
def frame(events):
    "The pulses of the events as a table."
    names = ["time", "charge", "sensor_id", "auxiliary"]
    tables = [pd.DataFrame(e["pulse_features"].numpy(), columns=names).assign(event_id=int(e["event_id"]))
              for e in events]
    return pd.concat(tables, ignore_index=True)


def assert_same(table, expected):
    "Equal directions of the expected events, to a thousandth of a degree."
    table = table.set_index("event_id").loc[expected.event_id]
    a, b = (angles_to_vector(*torch.tensor(t[["azimuth", "zenith"]].to_numpy().T)) for t in (table, expected))
    assert float((a - b).abs().max()) < 1e-5


def test_unknown_settings():
    for wrong in ("tiny", {"width": 3}):
        with pytest.raises(ValueError, match="unknown"): model_settings(wrong)


def test_angles_vectors_and_table_agree(model, batch, expected):
    with torch.no_grad():
        angles = model(batch)
        unit, kappa = model.direction(batch)
    assert (angles >= 0).all() and (angles[:, 0] < 2 * math.pi).all() and (angles[:, 1] <= math.pi).all()
    torch.testing.assert_close(angles_to_vector(*angles.T), unit, atol=1e-5, rtol=0)
    assert expected.event_id.tolist() == batch["metadata"]["event_ids"].tolist()
    np.testing.assert_allclose(expected.kappa, kappa, rtol=1e-4)


def test_parts_in_any_order(model, dataset, batch, expected):
    "Parts of one batch, backwards, and mixed with the parts of another."
    parts = list(split_batch(batch, 2))
    more = list(split_batch(collate_dom_packing(dataset.__getitems__(range(32, 40))), 1))
    n = min(len(parts), len(more))
    mixed = [p for pair in zip(parts[:n], more[:n], strict=True) for p in pair] + parts[n:] + more[n:]
    for batches in ([batch], parts, parts[::-1], mixed): assert_same(model.predict(batches), expected)


def test_events_that_come_again_or_in_part(model, batch):
    parts = list(split_batch(batch, 2))
    with pytest.raises(ValueError, match="comes again"): model.predict([batch, parts[0]])

    def is_whole(m): return torch.equal(torch.bincount(m["dom_to_event_idx"]), m["event_dom_counts"])
    cut = next(p for p in parts if not is_whole(p["metadata"]))
    with pytest.raises(ValueError, match="holds parts of events"): model(cut)
    with pytest.warns(UserWarning, match="incomplete"): table = model.predict(parts[:-1])
    assert table.azimuth.isna().any()
    assert set(table.event_id) == {int(i) for p in parts[:-1] for i in p["metadata"]["event_ids"]}


def test_frames(model, frame, expected):
    "Rows in any order; event_id as column, index, text or a large number."
    assert_same(model.predict(frame), expected)
    assert_same(model.predict(frame.sample(frac=1, random_state=0)), expected)
    assert len(model.predict(frame[:0])) == 0
    ids = frame.event_id.astype(str)
    text = ids.mask(np.arange(len(frame)) % 3 == 0, " 0" + ids + ".0")
    assert model.predict(frame.assign(event_id=text)).equals(model.predict(frame))
    large = [2 ** 62 + i for i in expected.event_id]
    for event_id in (2 ** 62 + frame.event_id, (2 ** 62 + frame.event_id).astype(str)):
        assert model.predict(frame.assign(event_id=event_id)).event_id.tolist() == large


@pytest.mark.parametrize("clock", [1e12, 31_536_000 * 10 ** 9, 1_764_300_000 * 10 ** 9])
def test_frames_with_any_clock(model, frame, expected, clock):
    "Also nanoseconds of the year, and since 1970."
    late = frame.assign(time=frame.time.astype("int64" if isinstance(clock, int) else "float64") + clock)
    assert_same(model.predict(late.set_index("event_id")), expected)
    assert_same(model.predict(late.astype(dict(time=object))), expected)
    if clock < 1e18: return
    with pytest.raises(ValueError, match="column time.*256 ns"):
        model.predict(late.astype(dict(time="float64")))


@pytest.mark.parametrize("column, value, words", [
    ("charge", -1., "charge"), ("charge", 3e38, "1e\\+30 p.e."), ("time", np.nan, "finite"),
    ("sensor_id", 5160, "sensor_id"), ("auxiliary", 2, "auxiliary")])
def test_frames_with_impossible_values(model, frame, column, value, words):
    "The message names the column and the event."
    with pytest.raises(ValueError, match=words) as error: model.predict(frame.assign(**{column: value}))
    assert str(frame.event_id[0]) in str(error.value)


def test_frames_that_lack_something(model, frame):
    with pytest.raises(ValueError, match="lacks time"): model.predict(frame.drop(columns="time"))
    with pytest.raises(ValueError, match="lacks time.*graphnet_pulses"):
        model.predict(frame.rename(columns=dict(time="dom_time")))
    with pytest.raises(ValueError, match="column event_id.*whole number"):
        model.predict(frame.assign(event_id=frame.event_id + 0.5))
    with pytest.warns(UserWarning, match="is the unit photo-electrons"):
        assert model.predict(frame.assign(charge=MAX_CHARGE)).notna().all().all()
    with pytest.raises(TypeError, match="not a str"): model.predict("pulses.parquet")
    with pytest.raises(TypeError, match=r"\bint\b"): model.predict([3])


def test_data_sets(model, dataset, expected):
    table = predict_dataset(model, dataset, max_pulses=4_096, progress=False)
    assert table.event_id.tolist() == dataset.event_ids.tolist()
    assert_same(table, expected)


def test_gradients_through_the_accumulator(model, batch):
    "Every parameter has one, and the accumulator does not change it."
    def gradients(vector, targets):
        model.zero_grad()
        vmf_loss(vector, angles_to_vector(*targets.T)).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model.vector(batch), batch["metadata"]["targets"])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in expected.values())
    accumulator = EventAccumulator()
    for part in split_batch(batch, 2): accumulator.add_batch(*model.t1(part))
    t2_batch, = accumulator.get_complete_events(batch_size=32)
    found = gradients(model.t2.vector(**t2_batch), t2_batch["targets"])
    model.zero_grad(set_to_none=True)
    for name, g in expected.items(): assert (found[name] - g).norm() <= 1e-3 * g.norm() + 1e-7, name


def test_saved_and_loaded(model, dataset, batch, tmp_path):
    path = tmp_path / "new" / "best.safetensors"
    model.save(path)
    for source in (path, path.parent):
        again = HierarchicalTransformer.load(source)
        assert again.settings == model.settings
        with torch.no_grad(): assert torch.equal(again(batch), model(batch))
    assert [p.name for p in path.parent.iterdir()] == ["best.safetensors"]
    written = path.read_bytes()
    for _ in range(8):                                         # safetensors writes its names in any order
        model.save(path)
        assert path.read_bytes() == written
    detector = Geometry.from_weights(path)                     # to simulate events for this model
    assert np.abs(detector.xyz - dataset.geometry.xyz).max() < 1e-3
    assert np.allclose(detector.efficiency, dataset.geometry.efficiency)
    other = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    model.save(path, other)
    assert not any(p.any() for p in HierarchicalTransformer.load(path).parameters())


def test_sensors_that_lie_elsewhere(model, dataset):
    model.check_geometry(dataset.geometry)
    moved = copy.copy(dataset.geometry)
    object.__setattr__(moved, "xyz", dataset.geometry.xyz + np.array([0, 2., 0]))
    with pytest.raises(ValueError, match="2.0 m"): model.check_geometry(moved)


def test_dead_sensors_may_lie_elsewhere(model, dataset):
    "Tables fill in the positions of dead DOMs, which have no pulses, as they like."
    xyz, efficiency = dataset.geometry.xyz.copy(), dataset.geometry.efficiency.copy()
    xyz[479] += 1.8
    with pytest.raises(ValueError, match="sensor 479"): model.check_geometry(Geometry(xyz, efficiency))
    efficiency[479] = 0
    model.check_geometry(Geometry(xyz, efficiency))


def test_files_that_are_no_weights(model, tmp_path):
    path = tmp_path / "best.safetensors"
    settings = json.dumps(vars(model.settings))
    for header, words in ((dict(settings=settings), r"another version of iceaggr \(1,"),
                          (dict(format="pt"), "not written by iceaggr")):
        path.write_bytes(safetensors_bytes(model.state_dict(), header))
        with pytest.raises(ValueError, match=words): HierarchicalTransformer.load(path)
    model.save(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"): HierarchicalTransformer.load(path)
    with pytest.raises(ValueError, match="not a model"): Geometry.from_weights(path)
    with pytest.raises(FileNotFoundError, match="nonesuch"):
        HierarchicalTransformer.from_pretrained("nonesuch")
    with pytest.raises(FileNotFoundError, match="no weights at"):
        HierarchicalTransformer.load(tmp_path / "none")


def test_files_older_than_the_head_of_confidence_load_as_before(dataset, batch, tmp_path):
    "Its factor is 1 there; a training starts from them, too."
    model = HierarchicalTransformer(SETTINGS, dataset.geometry).eval()      # untrained: the factor is 1
    old = {name: x for name, x in model.state_dict().items() if not name.startswith("t2.confidence.")}
    model.save(tmp_path / "old.safetensors", old)
    again = HierarchicalTransformer.load(tmp_path / "old.safetensors")
    with torch.no_grad(): assert torch.equal(again.vector(batch), model.vector(batch))
    fresh = HierarchicalTransformer(SETTINGS, dataset.geometry).eval()
    _start_from(fresh, tmp_path / "old.safetensors")
    with torch.no_grad(): assert torch.equal(fresh.vector(batch), model.vector(batch))


@pytest.mark.parametrize("field, value, word", [
    ("settings", dict(dom_layers=10**7), "dom_layers must be a whole number from 0 to 1,000"),
    ("settings", dict(dom_heads=0), "dom_heads"), ("settings", dict(event_d_model="wide"), "event_d_model"),
    ("settings", dict(max_seq_len=10**12), "max_seq_len"), ("settings", dict(dropout="x"), "dropout"),
    ("settings", None, "settings is no JSON object"), ("settings", "{", "settings is no JSON object"),
    ("parts", [1], "parts is no JSON object"), ("parts", dict(model=3), "no whole model"),
    ("parts", {"pool": {"class": 7}}, "no whole model"), ("seen", dict(pulses="x"), "no whole model"),
    ("seen", dict(doms=[1]), "no whole model"), ("seen", [3], "seen is no JSON object"),
    ("sensors", torch.zeros(3), "no whole model"),
    ("sensors", None, "no whole model")])
def test_damaged_headers_are_refused_before_anything_is_built(model, tmp_path, field, value, word):
    state, settings = dict(model.state_dict()), vars(model.settings)
    header = dict(format="pt", version=WEIGHTS_VERSION, settings=json.dumps(settings), parts="{}")
    if field == "sensors":
        if value is None: del state["t2.sensors"]
        else: state["t2.sensors"] = value
    elif isinstance(value, str): header[field] = value
    elif field == "settings" and value: header[field] = json.dumps(settings | value)
    else: header[field] = json.dumps(value)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(safetensors_bytes(state, header))
    with pytest.raises(ValueError, match=word): HierarchicalTransformer.load(path)


def test_events_unlike_those_of_the_training_are_warned_of(model, dataset, batch, tmp_path):
    "The ranges travel with the weights; a factor of two is allowed; a file without ranges says nothing."
    ranges = ranges_of_events(dataset)
    assert ranges["pulses"] == [dataset.n_pulses.min(), dataset.n_pulses.max()]
    assert ranges["doms"][1] <= dataset.n_pulses.max()
    assert 0 <= ranges["deepcore"][0] <= ranges["deepcore"][1] <= 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model.seen in ({}, ranges): model.predict(batch)
    n = batch["metadata"]["dom_features"][:, 2]
    largest = int(torch.zeros(len(batch["metadata"]["event_ids"])).index_add_(
        0, batch["metadata"]["dom_to_event_idx"], n).max())
    model.seen = dict(ranges, pulses=[1, largest // 3])
    model.save(tmp_path / "narrow.safetensors")
    model.seen = {}
    narrow = HierarchicalTransformer.load(tmp_path / "narrow.safetensors")
    message = rf"events lie outside .* \(pulses 1 to {largest // 3:,}: .* outside\)"
    with pytest.warns(UserWarning, match=message): narrow.predict(batch)


def test_files_without_parts_load_as_before(model, batch, tmp_path):
    header = dict(format="pt", version=WEIGHTS_VERSION, settings=json.dumps(vars(model.settings)))
    path = tmp_path / "old.safetensors"
    path.write_bytes(safetensors_bytes(model.state_dict(), header))
    assert read_file(path)[2] == {}
    with torch.no_grad(): assert torch.equal(HierarchicalTransformer.load(path)(batch), model(batch))


class Variant(HierarchicalTransformer):
    "A model outside the package."


class MaxPool(nn.Module):
    "A pooling outside the package: the largest of each channel."
    def __init__(self, d_model, factor=1.):
        super().__init__()
        self.norm, self.factor = nn.LayerNorm(d_model), factor

    def forward(self, x, segments):
        return self.factor * segments.reduce(self.norm(x), "max")


def test_subclasses_name_themselves(tmp_path):
    "A subclass elsewhere is loaded by its own load; one in the package also by the base class's."
    from iceaggr.studies.ablations import WithoutVertex
    path = tmp_path / "variant.safetensors"
    Variant(SETTINGS).save(path)
    assert type(Variant.load(path)) is Variant
    with pytest.raises(ValueError, match=r"Variant, which is not part .* call Variant.load\(path\)"):
        HierarchicalTransformer.load(path)
    WithoutVertex(SETTINGS).save(path)
    assert type(HierarchicalTransformer.load(path)) is WithoutVertex
    with pytest.raises(ValueError, match="not a Variant: call WithoutVertex.load"): Variant.load(path)


def test_nothing_outside_the_package_is_imported(tmp_path, monkeypatch):
    "Not even when a file names a module that could be imported, or one that iceaggr imported."
    trap = types.ModuleType("trap")
    trap.__getattr__ = lambda name: pytest.fail(f"trap.{name} was looked up")
    monkeypatch.setitem(sys.modules, "trap", trap)
    (tmp_path / "bait.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("trap.Pool", "bait.Pool", "os.system", "torch.nn.Identity", "iceaggr", "iceaggr.model.os",
                 "iceaggr.model.nn.Linear", "iceaggr.model.DOMTransformer", "iceaggr..bait.Pool",
                 "iceaggrx.Pool", "iceaggr.nothing.Pool", "iceaggr.model.ModelSettings",
                 "iceaggr.model.Missing", ""):
        with pytest.raises(ValueError, match="load"): import_part(name, "call load(path, pool=Pool)")
    assert "bait" not in sys.modules
    assert import_part("iceaggr.model.HierarchicalTransformer", "") is HierarchicalTransformer


def test_parts_are_found_by_name():
    part = describe_part(functools.partial(MaxPool, factor=2.))
    assert part == {"class": f"{__name__}.MaxPool", "kwargs": {"factor": 2.}}
    with pytest.raises(ValueError, match=r"not part of iceaggr: call load\(path, pool=MaxPool\)"):
        find_part(part, None, "pool")
    assert find_part(part, MaxPool, "pool")(8).factor == 2.
    assert find_part(part, functools.partial(MaxPool, factor=3.), "pool")(8).factor == 3.
    with pytest.raises(ValueError, match="saved with pool="): find_part(part, nn.Identity, "pool")
    with pytest.raises(ValueError, match="without a pool"): find_part(None, MaxPool, "pool")
    assert find_part(None, None, "pool") is None
    assert find_model(None, Variant) is Variant


def test_parts_that_cannot_be_named():
    for wrong in (lambda d_model: MaxPool(d_model), MaxPool(8), "max", functools.partial(MaxPool, 8)):
        with pytest.raises(TypeError, match="^.* is not a part of a model: .*class.*$"): describe_part(wrong)
    with pytest.raises(TypeError, match="JSON"):
        describe_part(functools.partial(MaxPool, factor=torch.ones(1)))


@pytest.mark.parametrize("pool", [MaxPool, functools.partial(MaxPool, factor=0.5)])
def test_exchanged_pooling_survives_save_and_load(dataset, batch, tmp_path, pool):
    "The class must be passed; its keyword arguments come from the file."
    torch.manual_seed(0)
    model = HierarchicalTransformer(SETTINGS, dataset.geometry, pool=pool).eval()
    path = tmp_path / "max.safetensors"
    model.save(path)
    again = HierarchicalTransformer.load(path, pool=MaxPool)
    assert isinstance(again.t1.pool, MaxPool) and again.t1.pool.factor == model.t1.pool.factor
    with torch.no_grad(): assert torch.equal(again(batch), model(batch))
    assert_same(model.predict(split_batch(batch, 2)), model.predict(batch))
    with pytest.raises(ValueError, match=r"load\(path, pool=MaxPool\)"): HierarchicalTransformer.load(path)


def test_no_warning_from_a_plain_prediction(model, frame):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(frame)


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    "A diverged run does not become predictions without values."
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["t2.head.1.weight"][0, 0] = torch.nan
    model.save(tmp_path / "diverged.safetensors", state)
    with pytest.raises(ValueError, match="not finite .t2.head.1.weight.: the training diverged"):
        HierarchicalTransformer.load(tmp_path / "diverged.safetensors")
