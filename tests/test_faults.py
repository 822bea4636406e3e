"""Bad data: what the readers refuse, what they leave out with skip, and that they never drop a good event."""
import json
import pickle
import warnings

import numpy as np
import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import iceaggr.io.kaggle
from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.engine.loading import EventBatchSampler, PackedBatches
from iceaggr.engine.prepare import prepare
from iceaggr.io.frames import frame_to_events
from iceaggr.io.prepared import read_arrow
from iceaggr.model import HierarchicalTransformer
from iceaggr.simulation.dataset import simulate_events
from iceaggr.testing import BATCH, FAULTS, FILE_3, META, call, put, same_events, sound_data, write_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*are left out, as something is wrong with them")
SKIP = ("--on-bad-event", "skip")


@pytest.fixture(scope="module")
def sound(tmp_path_factory): return sound_data(tmp_path_factory.mktemp("sound"))


def spoil(root, file, change):
    "Change a table of a data set."
    table = pd.read_parquet(root / file).reset_index(drop=file == META)
    change(table).to_parquet(root / file, index=False)


def skipping(root, **options): return IceCubeDataset(root, on_bad_event="skip", **options)


# The readers

@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_every_fault_of_the_table(sound, tmp_path, fault):
    "The library refuses the first bad event, or leaves out the bad ones only. The notebook runs the command."
    root = write_tiny(tmp_path)
    (root / "sensor_geometry.csv").write_bytes((sound.root / "sensor_geometry.csv").read_bytes())
    fault.make(root)

    def read(**options):
        ds = IceCubeDataset(root, **options)
        return ds, ds.geometry, list(ds)

    with pytest.raises(ValueError, match=str(root / fault.file)) as error: read()
    assert fault.says in str(error.value) and "\n" not in str(error.value)
    if fault.bad is None:
        with pytest.raises(ValueError, match=str(root / fault.file)): read(on_bad_event="skip")
        return
    ds, *_ = read(on_bad_event="skip")
    assert same_events(ds, sound) and sorted(ds.skipped.event_id) == fault.bad
    assert (ds.skipped.reason.str.len() > 10).all()
    assert len(ds) == 21 - len(fault.bad) + (fault.name == "row of the meta table twice")
    assert ds.with_gaps(ds.event_table()).n_pulses.isna().sum() == len(ds.asked) - len(ds)


# What can be done to an event: to its first row in the batch file, or to its row in the meta table.
PULSE_CHANGES = {
    "charge": [0.0, -1.0, np.inf, 1e39, 3e38, None],
    "time": [-1, 2**24 + 1],
    "sensor_id": [-1, 5160, 40_000],
    "event_id": [77],
    "auxiliary": [None],
}
META_CHANGES = {
    "azimuth": [7.0, None],
    "zenith": [-1.0],
    "first_pulse_index": [-5, None],
    "last_pulse_index": [-1, 10**9, None],
    "event_id": [5],
}
changes = st.sampled_from([
    (table, column, value)
    for table, columns in (("pulses", PULSE_CHANGES), ("meta", META_CHANGES))
    for column, values in columns.items() for value in values])


def spoil_events(sound, faults):
    "The meta table and the batch tables with a change to each of some events."
    meta = pd.read_parquet(sound.root / META)
    tables = {b: pd.read_parquet(sound.root / f"train/batch_{b}.parquet").reset_index() for b in (2, 3, 10)}
    for k, (table, column, value) in faults.items():
        batch = int(sound.event_table().batch_id[k])
        if table == "pulses": tables[batch] = put(column, int(sound.first[k]), value)(tables[batch])
        else: meta = put(column, k, value)(meta)
    return meta, tables


@settings(max_examples=30, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.integers(0, 20), changes, max_size=6), st.sampled_from([5, 17, 10**6]),
       st.sampled_from([3, 64, 1 << 20]))
def test_any_bad_events_and_no_good_one(sound, tmp_path_factory, faults, row_group_size, piece):
    "Any events are spoilt in any way, in row groups and pieces of any size: exactly these are left out."
    root = tmp_path_factory.mktemp("random")
    (root / "train").mkdir()
    meta, tables = spoil_events(sound, faults)
    meta.convert_dtypes().to_parquet(root / META, index=False)
    for b, table in tables.items():
        table.to_parquet(root / f"train/batch_{b}.parquet", index=False, row_group_size=row_group_size)
    good = [event_id for k, event_id in enumerate(sound.event_ids) if k not in faults]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(iceaggr.io.kaggle, "CHUNK_ROWS", piece)
        ds = skipping(root)
        assert len(ds.skipped) == len(faults) and ds.event_ids.tolist() == good and same_events(ds, sound)
        if faults:
            with pytest.raises(DataError): list(IceCubeDataset(root))


def test_damage_in_one_row_group_costs_its_events_only(sound, tmp_path):
    root = write_tiny(tmp_path)
    path = root / BATCH
    pd.read_parquet(path).reset_index().to_parquet(path, index=False, row_group_size=24)
    data, chunk = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start:start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)
    meta = pd.read_parquet(root / META)
    touched = (meta.batch_id == 3) & (meta.first_pulse_index < 48) & (meta.last_pulse_index >= 24)
    touched = meta.event_id[touched].tolist()
    assert 0 < len(touched) < 6
    ds = skipping(root)
    assert sorted(ds.skipped.event_id) == touched and same_events(ds, sound)
    assert ds.skipped.reason.str.contains("damaged").all()
    out = prepare(root, tmp_path / "out", progress=False, check=True, on_bad_event="skip")
    assert same_events(IceCubeDataset(out), sound)
    with pytest.raises(DataError, match="damaged"): list(IceCubeDataset(root))


def test_one_event_in_two_files(sound, tmp_path):
    "Pulses and meta table agree that both files hold event 3000: the first is kept."
    root = write_tiny(tmp_path / "data")
    for file in (META, "train/batch_10.parquet"):
        spoil(root, file, lambda t: t.assign(event_id=t.event_id.where(t.event_id != 10003, 3000)))
    with pytest.raises(DataError, match="event 3000 .batch 10.: 3000 is duplicated"): IceCubeDataset(root)
    with pytest.raises(DataError, match="3000 is (duplicated|there more than once)"):
        prepare(root, tmp_path / "out", progress=False)
    prepare(root, tmp_path / "skip", progress=False, on_bad_event="skip")
    expected = [3000 if event_id == 10003 else event_id for event_id in sound.event_ids]
    for ds in (skipping(root), skipping(tmp_path / "skip")):
        assert ds.skipped.event_id.tolist() == [3000] and len(ds) == 20 and same_events(ds, sound)
        rows = ds.with_gaps(ds.event_table())
        assert rows.event_id.tolist() == expected
        assert np.flatnonzero(rows.n_pulses.isna()).tolist() == [15]


def test_chosen_events_and_files(sound, tmp_path):
    "Files and events are chosen first: a bad event among them leaves a gap, others are not looked at."
    root = write_tiny(tmp_path)
    spoil(root, BATCH, put("charge", 0, 0.0))
    assert len(skipping(root, batch_ids=[2, 10]).skipped) == 0
    ds = skipping(root, batch_ids=[3], max_events=2)
    assert ds.event_ids.tolist() == [3003] and ds.skipped.event_id.tolist() == [3000]
    ds = skipping(root, batch_ids=[10, 3])
    assert ds.batch_ids == [10, 3]
    assert ds.with_gaps(ds.event_table()).event_id.tolist() == [*range(10000, 10020, 3), *FILE_3]
    with pytest.raises(DataError, match='"error" or "skip"'): IceCubeDataset(root, on_bad_event="ignore")


def test_files_that_are_missing(sound, tmp_path):
    "A file that the meta table names is a fault of the data. Another one is a fault of the request."
    root = write_tiny(tmp_path)
    (root / "train/batch_2.parquet").unlink()
    with pytest.raises(DataError, match="column batch_id, event 2000 .batch 2.: 2 has no file"):
        IceCubeDataset(root)
    assert len(IceCubeDataset(root, batch_ids=[10])) == 7
    out = tmp_path / "prepared"
    with pytest.raises(DataError, match="no file of batch 99"): skipping(root, batch_ids=[10, 99])
    with pytest.raises(DataError, match="no file of batch 99"):
        prepare(root, out, [10, 99], on_bad_event="skip", progress=False)
    prepare(root, out, [10, 2], on_bad_event="skip", progress=False)
    with pytest.raises(DataError, match="no file of batch 99"): skipping(out, batch_ids=[10, 99])
    assert skipping(out, batch_ids=[10, 2]).skipped.event_id.iloc[0] == 2000


def test_bad_events_do_not_reach_other_processes(sound, tmp_path):
    root = write_tiny(tmp_path)
    spoil(root, BATCH, put("charge", 0, 0.0))
    ds = skipping(root)
    assert same_events(pickle.loads(pickle.dumps(ds)), sound)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This DataLoader will create")     # on a machine with one core
        lists = list(EventBatchSampler(ds, 4, seed=1))
        loader = torch.utils.data.DataLoader(PackedBatches(ds, lists), batch_size=None, num_workers=2)
        found = [i for batch in loader for i in batch["metadata"]["event_ids"].tolist()]
    assert sorted(found) == [e for e in sound.event_ids if e != 3000]


# The prepared form

def test_a_damaged_prepared_set(sound, tmp_path):
    out = prepare(sound.root, tmp_path / "out", progress=False)
    path = out / "train/batch_3.pulses.arrow"
    data = bytearray(path.read_bytes())
    data[data.find(read_arrow(path).column("charge").to_numpy().tobytes()) + 5] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match="batch_3.pulses.arrow: damaged"): list(IceCubeDataset(out))
    ds = skipping(out)
    assert ds.skipped.event_id.tolist() == FILE_3 and same_events(ds, sound)
    assert ds.with_gaps(ds.event_table()).event_id.tolist() == sound.event_ids.tolist()
    path.unlink()
    with pytest.raises(DataError, match="batch_3.pulses.arrow: missing"): IceCubeDataset(out)
    ds = skipping(out)
    assert len(ds) == 15 and same_events(ds, sound)
    prepare(sound.root, out, progress=False, check=True)
    assert same_events(IceCubeDataset(out), sound) and len(IceCubeDataset(out)) == 21


def test_prepare_makes_a_set_with_gaps_anew_without_skip(sound, tmp_path):
    root, good = write_tiny(tmp_path / "data"), (sound.root / BATCH).read_bytes()
    spoil(root, BATCH, put("charge", 0, 0.0))
    out = prepare(root, tmp_path / "out", progress=False, on_bad_event="skip")
    assert len(IceCubeDataset(out)) == 20
    with pytest.raises(DataError, match="event 3000"): prepare(root, out, progress=False)
    (root / BATCH).write_bytes(good)
    assert len(IceCubeDataset(prepare(root, out, progress=False))) == 21


COMPARED = ("charge missing", "auxiliary missing", "charge beyond float32", "column missing",
            "damaged inside", "meta without its file")


@pytest.mark.parametrize("fault", [f for f in FAULTS if f.name in COMPARED], ids=lambda f: f.name)
def test_what_is_left_is_compared_with_the_source(tmp_path, fault, monkeypatch):
    root = write_tiny(tmp_path / "data")
    fault.make(root)
    prepare(root, tmp_path / "out", progress=False, check=True, on_bad_event="skip")
    read = pq.read_table

    def later(*args, **options):
        table = read(*args, **options)
        return table.set_column(table.column_names.index("time"), "time", pc.add(table.column("time"), 1))

    monkeypatch.setattr("iceaggr.engine.prepare.pq.read_table", later)
    b = 3 if fault.bad != FILE_3 else 2
    with pytest.raises(DataError, match=f"batch_{b}.events.arrow: events .* differ from the source"):
        prepare(root, tmp_path / "out", [b], progress=False, check=True, on_bad_event="skip")


def test_the_list_is_of_all_that_was_prepared(sound, tmp_path):
    "File after file, one split after the other; a set made anew without gaps is off the list."
    root, out = write_tiny(write_tiny(tmp_path / "data"), {1: 4}, split="test"), tmp_path / "out"
    good = (root / BATCH).read_bytes()
    for file in ("train/batch_2.parquet", BATCH, "test/batch_1.parquet"):
        spoil(root, file, put("charge", 0, 0.0))

    def listed(): return pd.read_csv(out / "skipped.csv").event_id.tolist()

    for split, batches, ids in (("train", 2, [2000]), ("train", [3], [3000, 2000]),
                                ("test", None, [1000, 2000, 3000]), ("train", [10], [2000, 3000, 1000])):
        prepare(root, out, batches, split, progress=False, on_bad_event="skip")
        assert listed() == ids
    (root / BATCH).write_bytes(good)
    prepare(root, out, [3], progress=False)
    assert listed() == [2000, 1000]


# The command

@pytest.fixture
def three_bad_events(tmp_path):
    "Events 2000, 3000 and 10018 are bad: azimuth, charge, sensor."
    root = write_tiny(tmp_path / "data")
    spoil(root, BATCH, put("charge", 0, 0.0))
    spoil(root, "train/batch_10.parquet", put("sensor_id", -1, 9999))
    spoil(root, META, put("azimuth", 0, None))
    return root


def test_train_and_evaluate_leave_bad_events_out(three_bad_events, tmp_path):
    root = three_bad_events
    train = ["train", "--data", root, "--epochs", 1, "--batch-size", 4]
    train += ["--train-batches", "2,3", "--valid-batches", 10]
    code, _, err = call(*train, "--out", tmp_path / "no")
    assert code == 1 and "event 2000" in err and not (tmp_path / "no").exists()
    code, out, err = call(*train, "--out", tmp_path / "run", *SKIP)
    assert code == 0 and "3 bad events left out" in out, err
    assert sorted(pd.read_csv(tmp_path / "run/skipped.csv").event_id) == [2000, 3000, 10018]
    facts = json.loads((tmp_path / "run/settings.json").read_text())
    assert (facts["train_events"], facts["valid_events"]) == (12, 6)
    predict = ["predict", "--run", tmp_path / "run", "--data", root, "--out", tmp_path / "p.parquet"]
    assert call(*predict)[0] == 1 and not (tmp_path / "p.parquet").exists()
    code, out, err = call(*predict, *SKIP)
    assert code == 0 and "18 predictions" in out, err
    evaluate = ["evaluate", "--predictions", tmp_path / "p.parquet", "--data", root]
    evaluate += ["--out", tmp_path / "report"]
    code, _, err = call(*evaluate)
    assert code == 1 and "event 2000" in err
    code, out, err = call(*evaluate, *SKIP)
    assert code == 0 and "3 bad events left out" in out, err
    assert json.loads((tmp_path / "report/metrics.json").read_text())["n_events"] == 18


def test_train_needs_a_good_event(three_bad_events, tmp_path):
    root = three_bad_events
    for file in (root / "train").iterdir(): file.write_bytes(b"")
    code, _, err = call("train", "--data", root, "--train-batches", "2,3", "--valid-batches", 10,
                        "--out", tmp_path / "none", *SKIP)
    assert code == 1 and "no good event in the files [2, 3]" in err


def test_an_empty_prediction_names_every_event(sound, tmp_path):
    "Nothing of the only file can be read. The prediction still has six rows, also of the prepared form."
    root = write_tiny(tmp_path / "data")
    (root / BATCH).write_bytes(b"")
    prepared = prepare(root, tmp_path / "out", [3], progress=False, on_bad_event="skip")
    HierarchicalTransformer("small").save(tmp_path / "model.safetensors")
    for data, options in ((root, SKIP), (prepared, ())):
        code, out, err = call("predict", "--run", tmp_path / "model.safetensors", "--data", data,
                              "--batches", 3, "--out", tmp_path / "p.csv", *options)
        table = pd.read_csv(tmp_path / "p.csv")
        assert code == 0 and "0 predictions" in out, err
        assert table.event_id.tolist() == FILE_3 and table.azimuth.isna().all()
        assert pd.read_csv(tmp_path / "skipped.csv").event_id.tolist() == FILE_3


@pytest.mark.parametrize("offset, bad", [(10 ** 6, 0), (2 ** 53, 0), (2 ** 63 - 200, 0), (-2 ** 63, 0),
                                         (-2 ** 63, 59)])
def test_ids_of_any_size_survive_a_bad_event(tmp_path, offset, bad):
    "One bad charge costs one event, whatever the ids: as floats, large ones would be the same. Both forms."
    root = write_tiny(tmp_path / "data", {1: 60, 2: 60})
    meta = pd.read_parquet(root / META)
    new = {old: offset + k for k, old in enumerate(meta.event_id)}
    meta.assign(event_id=meta.event_id.map(new)).to_parquet(root / META, index=False)
    for k in (1, 2):
        path = root / f"train/batch_{k}.parquet"
        table = pd.read_parquet(path)
        table.index = pd.Index([new[i] for i in table.index], name="event_id", dtype="int64")
        row = np.flatnonzero(table.index == offset + bad)[:1]     # in the first file only
        table.iloc[row, table.columns.get_loc("charge")] = -1.0
        table.to_parquet(path)
    prepared = prepare(root, tmp_path / "out", progress=False, on_bad_event="skip")
    for folder in (root, prepared):
        dataset = IceCubeDataset(folder, on_bad_event="skip")
        assert dataset.event_ids.tolist() == [offset + k for k in range(120) if k != bad]
        assert dataset.skipped.event_id.tolist() == [offset + bad]


# A frame of pulses

@pytest.fixture(scope="module")
def model(): return HierarchicalTransformer.from_pretrained("small")


@pytest.fixture(scope="module")
def pulses(): return simulate_events(3, seed=2, geometry="small")[0]


def test_a_frame_may_have_an_index_and_other_columns(model, pulses):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = model.predict(pulses)
        for index in (["event_id", "sensor_id"], "event_id"):
            pd.testing.assert_frame_equal(model.predict(pulses.set_index(index)), plain)
        frame_to_events(pulses.head(3))     # too few pulses to doubt their units
        model.predict(pulses.iloc[:0])
    duplicated = pd.concat([pulses.assign(note=1), pd.Series(2, pulses.index, name="note")], axis=1)
    pd.testing.assert_frame_equal(model.predict(duplicated), plain)     # a column that is not needed


def test_wrong_units_are_doubted(model, pulses):
    for factor in (1e-3, 1e6):
        with pytest.warns(UserWarning, match="is the unit nanoseconds") as caught:
            model.predict(pulses.assign(time=pulses.time * factor))
        assert caught[0].filename == __file__     # the warning points to the caller
    with pytest.warns(UserWarning, match="is the unit photo-electrons"):
        model.predict(pulses.assign(charge=pulses.charge * 1e6))


@pytest.mark.parametrize(("column", "value", "message"), [
    ("charge", "a lot", "'a lot' is not a finite number"),
    ("charge", -1.0, "'-1.0' is not positive"),
    ("sensor_id", 7.5, "'7.5' is not a whole number"),
    ("auxiliary", "True", "'True' is neither 0 nor 1"),
    ("time", None, "is not a finite number"),
])
def test_bad_values_of_a_frame_are_named(model, pulses, column, value, message):
    event, bad = pulses.event_id.iloc[4], pulses.astype({column: object})
    bad.iloc[4, bad.columns.get_loc(column)] = value
    with pytest.raises(ValueError, match=f"column {column}, event {event}: .*{message}"): model.predict(bad)


def test_frames_of_the_wrong_type(model, pulses):
    whole = pulses.time.astype(np.int64)
    for kind in ("datetime64[ns]", "datetime64[us]"):
        with pytest.raises(ValueError, match="column time: its type is"):
            model.predict(pulses.assign(time=whole.astype(kind)))
    with pytest.raises(ValueError, match="column time: its type is object"):
        model.predict(pulses.assign(time=pd.to_datetime(pulses.time).astype(object)))
    with pytest.raises(ValueError, match="column time twice"):
        model.predict(pd.concat([pulses, pulses.time], axis=1))
    for other in ("pulses.parquet", pulses.to_dict(), pulses.to_numpy(), pulses.time, [pulses], [{}], None):
        with pytest.raises(TypeError, match="a pandas frame of pulses"): model.predict(other)
