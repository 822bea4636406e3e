"""The Kaggle layout and the prepared form: what is refused, what is accepted, and that nothing is lost."""
import json
import os
import pickle
import re
import shutil
import threading
import time
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from processes import ended, launch
from test_dom_order import reference_by_hand
from tqdm import tqdm

import iceaggr.data
import iceaggr.engine.prepare
import iceaggr.io.prepared
from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset, split_batches
from iceaggr.engine.loading import EventBatchSampler
from iceaggr.engine.prepare import prepare
from iceaggr.geometry import Geometry
from iceaggr.io.kaggle import find_batches, promised_files, read_meta
from iceaggr.io.prepared import copy_rows, prepared_facts, read_arrow, write_arrow
from iceaggr.pulses import PulseBlocks
from iceaggr.simulation.dataset import simulate_dataset
from iceaggr.testing import BATCH, META, put, write_tiny

COLUMNS = ["time", "charge", "sensor_id", "auxiliary"]
TABLES = ("pulses", "doms", "events")


def rewrite(root, file, change, **options):
    "Change a table of a data set."
    table = change(pd.read_parquet(root / file).reset_index(drop=file == META))
    table.to_parquet(root / file, index=False, **options)


def same(a, b): return torch.equal(a, b) and a.dtype == b.dtype


def same_events(a, b):
    "Assert that two lists of events are equal, key by key."
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)


def source_events(root, batch, split="train"):
    "Rows of the meta table and (P, 4) pulses of the events of a file, read in the plainest way."
    meta = pd.read_parquet(root / f"{split}_meta.parquet")
    pulses = pd.read_parquet(root / split / f"batch_{batch}.parquet")
    for row in meta[meta.batch_id == batch].itertuples():
        event = pulses.iloc[row.first_pulse_index:row.last_pulse_index + 1]
        yield row, event[COLUMNS].to_numpy(np.float32)


def destroy_row_groups(path, keep):
    "Overwrite all row groups of a Parquet file but some."
    data, info = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata
    for g in set(range(info.num_row_groups)) - keep:
        for c in range(info.num_columns):
            chunk = info.row_group(g).column(c)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            data[start:start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


# The data set

def test_the_contract(tiny_dataset, monkeypatch):
    "Keys, shapes, types and values of every event, and of the table of events."
    monkeypatch.setenv("ICEAGGR_DATA", str(tiny_dataset))
    ds = IceCubeDataset()
    assert find_batches() == ds.batch_ids == [2, 3, 10] and len(ds) == 21 and ds.cache_size == 1
    sources = [source for b in ds.batch_ids for source in source_events(tiny_dataset, b)]
    for event, (row, pulses) in zip(ds, sources, strict=True):
        assert list(event) == ["pulse_features", "event_id", "n_pulses", "target"]
        assert [tuple(v.shape) for v in event.values()] == [pulses.shape, (), (), (2,)]
        types = [torch.float32, torch.int64, torch.int64, torch.float32]
        assert [v.dtype for v in event.values()] == types
        assert np.array_equal(event["pulse_features"], pulses)
        assert event["event_id"] == row.event_id and event["n_pulses"] == len(pulses)
        assert event["target"].tolist() == np.float32([row.azimuth, row.zenith]).tolist()
    assert ds.event_ids.dtype == ds.n_pulses.dtype == np.int64 and len(ds.geometry) == 5160
    columns = ["batch_id", "event_id", "azimuth", "zenith"]
    assert ds.event_table()[columns].equals(pd.read_parquet(tiny_dataset / META)[columns])


def test_numbers_of_events(tiny_dataset):
    "From the end, of numpy and of torch, several at once, in any order; others are refused."
    ds = IceCubeDataset(tiny_dataset)
    same_events([ds[-1], ds[np.int64(3)], ds[torch.tensor(4)]], [ds[20], ds[3], ds[4]])
    order = [20, 0, 9, 9, -21, 13]
    same_events(ds.__getitems__(order), [ds[i] for i in order])
    for i in (21, -22):
        with pytest.raises(IndexError): ds[i]
    with pytest.raises(TypeError): ds[1.0]


def test_test_split_without_targets(tmp_path):
    root = write_tiny(tmp_path, {661: 4}, split="test")
    ds = IceCubeDataset(root, split="test")
    assert list(ds[0]) == ["pulse_features", "event_id", "n_pulses"] and "azimuth" not in ds.event_table()
    out = prepare(root, tmp_path / "out", split="test", check=True, progress=False)
    same_events(list(IceCubeDataset(out, "test")), list(ds))


def test_parts_of_a_data_set(tiny_dataset):
    "Files in an order, the first events, chosen events; the order of the meta table is that of the data set."
    ds = IceCubeDataset(tiny_dataset)
    two_files = list(IceCubeDataset(tiny_dataset, batch_ids=[10, 2]))
    same_events(two_files, [ds[i] for i in [*range(14, 21), *range(8)]])
    same_events(list(IceCubeDataset(tiny_dataset, max_events=10)), [ds[i] for i in range(10)])
    assert IceCubeDataset(tiny_dataset, max_events=8).batch_ids == [2]
    assert len(IceCubeDataset(tiny_dataset, max_events=10**9)) == 21
    chosen = list(IceCubeDataset(tiny_dataset, events=[10003, 3006, 3012]))
    same_events(chosen, [ds[i] for i in (10, 12, 15)])
    rewrite(tiny_dataset, META, lambda t: t.sample(frac=1, random_state=0))
    mixed = IceCubeDataset(tiny_dataset)
    back = pd.Series(range(21), index=ds.event_ids)[mixed.event_ids]
    assert mixed.batch_ids == [2, 3, 10] and (np.diff(back) < 0).any()
    same_events(list(mixed), [ds[i] for i in back])


def test_arguments_that_cannot_work(tiny_dataset, monkeypatch):
    monkeypatch.delenv("ICEAGGR_DATA", raising=False)
    with pytest.raises(DataError, match="ICEAGGR_DATA"): IceCubeDataset()
    with pytest.raises(DataError, match="no such folder"): IceCubeDataset(tiny_dataset / "none")
    with pytest.raises(DataError, match="test: no such folder"): IceCubeDataset(tiny_dataset, "test")
    with pytest.raises(DataError, match="no split 'valid'"): IceCubeDataset(tiny_dataset, "valid")
    with pytest.raises(DataError, match="no file of batch 4"): IceCubeDataset(tiny_dataset, batch_ids=[2, 4])
    with pytest.raises(DataError, match="twice"): IceCubeDataset(tiny_dataset, batch_ids=[2, 2])
    with pytest.raises(DataError, match="empty"): IceCubeDataset(tiny_dataset, batch_ids=[])
    with pytest.raises(DataError, match="event 7 is in none"): IceCubeDataset(tiny_dataset, events=[7])
    with pytest.raises(DataError, match="at least 1"): IceCubeDataset(tiny_dataset, max_events=0)


def test_missing_and_damaged_files(tiny_dataset):
    path = tiny_dataset / BATCH
    whole = path.read_bytes()
    zeros_inside = whole[:200] + b"\0" * 400 + whole[600:]
    for damaged in (whole[:len(whole) // 2], b"event_id,sensor_id\n1,2\n", b"", zeros_inside):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(str(path))): list(IceCubeDataset(tiny_dataset))
    ds = IceCubeDataset(tiny_dataset)
    path.unlink()
    with pytest.raises(DataError, match="no such file"): list(ds)
    (tiny_dataset / META).unlink()
    with pytest.raises(DataError, match=META): IceCubeDataset(tiny_dataset)
    for file in (tiny_dataset / "train").iterdir(): file.unlink()
    with pytest.raises(DataError, match="no batch files"): IceCubeDataset(tiny_dataset)


def test_only_requested_row_groups_are_read(tmp_path, monkeypatch):
    "The other row groups may be destroyed without consequence."
    monkeypatch.setattr("iceaggr.io.kaggle.CHUNK_ROWS", 20)     # the table of 100 rows counts as large
    root = write_tiny(tmp_path, {b: 5 for b in range(1, 21)})
    rewrite(root, META, lambda t: t, row_group_size=5)
    rewrite(root, "train/batch_7.parquet", lambda t: t, row_group_size=20)
    whole = IceCubeDataset(root, batch_ids=[7, 8])
    first_two = [whole[0], whole[1]]
    meta = read_meta(root / META, [7, 8])
    assert (meta.last_pulse_index[:2] < 80).all()
    destroy_row_groups(root / META, {6, 7})
    destroy_row_groups(root / "train/batch_7.parquet", set(range(4)))
    assert read_meta(root / META, [7, 8]).equals(meta)
    with pytest.raises(DataError, match="damaged"): read_meta(root / META, [6])
    same_events(list(IceCubeDataset(root, batch_ids=[7, 8], max_events=2)), first_two)
    with pytest.raises(DataError, match="damaged"): list(IceCubeDataset(root, batch_ids=[7]))


def test_pieces_of_any_size_agree(tiny_dataset, monkeypatch):
    "Events that lie across pieces and row groups are put together again, also some from the middle."
    before = list(IceCubeDataset(tiny_dataset))
    rewrite(tiny_dataset, BATCH, lambda t: t, row_group_size=11)
    for rows in (1, 7, 64):
        monkeypatch.setattr("iceaggr.io.kaggle.CHUNK_ROWS", rows)
        same_events(list(IceCubeDataset(tiny_dataset)), before)
        chosen = list(IceCubeDataset(tiny_dataset, events=[3003, 3012, 2021]))
        same_events(chosen, [before[i] for i in (7, 9, 12)])
    rewrite(tiny_dataset, BATCH, put("charge", -1, 0.0))
    with pytest.raises(DataError, match="event 3015"): list(IceCubeDataset(tiny_dataset))


def test_rows_of_no_event_are_skipped(tiny_dataset):
    ds = IceCubeDataset(tiny_dataset)
    keep = [i for i in range(21) if i not in (0, 9, 10, 20)]
    expected = [ds[i] for i in keep]
    rewrite(tiny_dataset, META, lambda t: t.iloc[keep])
    same_events(list(IceCubeDataset(tiny_dataset)), expected)


def test_times_out_of_order_are_sorted_stably(tiny_dataset):
    def shuffle(table):
        table = table.assign(time=table.time // 500 * 500)     # ties
        first = table.event_id == 3000
        rest = table[~first].sort_values(["event_id", "time"], kind="stable")
        return pd.concat([table[first].iloc[::-1], rest])

    rewrite(tiny_dataset, BATCH, shuffle)
    with pytest.warns(UserWarning, match=r"batch_3\.parquet: column time: 1 events"):
        ds = list(IceCubeDataset(tiny_dataset, batch_ids=[3]))
    for event, (_, pulses) in zip(ds, source_events(tiny_dataset, 3), strict=True):
        assert np.array_equal(event["pulse_features"], pulses[np.argsort(pulses[:, 0], kind="stable")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(IceCubeDataset(tiny_dataset, batch_ids=[2, 10]))


def test_the_cache_holds_the_files_used_last(tiny_dataset, monkeypatch):
    opened, read = [], iceaggr.data.read_pulses

    def noted(path, *args):
        opened.append(path.name)
        return read(path, *args)

    monkeypatch.setattr(iceaggr.data, "read_pulses", noted)
    for size, count in ((1, 6), (2, 6), (3, 3)):
        opened.clear()
        ds = IceCubeDataset(tiny_dataset, cache_size=size)
        assert not opened
        for i in (0, 8, 14, 1, 9, 15): ds[i]
        assert len(opened) == count and len(ds._open) == size
    opened.clear()
    ds = IceCubeDataset(tiny_dataset, cache_size=2)
    for i in (0, 8, 0, 14, 0, 8): ds[i]
    assert opened == [f"batch_{b}.parquet" for b in (2, 3, 10, 3)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("form", ["parquet", "prepared"])
def test_worker_processes(tiny_dataset, tmp_path, method, form):
    root = tiny_dataset if form == "parquet" else prepare(tiny_dataset, tmp_path / "out", progress=False)
    ds = IceCubeDataset(root)
    expected = list(ds)     # files are open when the workers start
    sampler = EventBatchSampler(ds, 4, seed=3)
    loader = torch.utils.data.DataLoader(ds, batch_sampler=sampler, num_workers=2,
                                         multiprocessing_context=method, collate_fn=list)
    for indices, events in zip(sampler, loader, strict=True):
        same_events(events, [expected[i] for i in indices])
    same_events(list(pickle.loads(pickle.dumps(ds))), expected)


def test_split_by_file():
    assert split_batches([1, 2, 10]) == ([1, 2], [10])
    assert split_batches(range(1, 5), 2) == ([1, 3, 4], [2])
    assert split_batches([3, 1], [1]) == ([3], [1])


@pytest.mark.parametrize(("files", "valid", "message"), [
    ([1, 2], [3], "not among"),
    ([1], None, "no file is left"),
    ([1, 2], [1, 2], "no file is left"),
    ([1, 1, 2], None, "must not overlap"),
])
def test_splits_that_cannot_work(files, valid, message):
    with pytest.raises(DataError, match=message): split_batches(files, valid)


def test_real_physics_events(ppc_root, tmp_path):
    "The prepared form of full-physics events is the same data, with the same geometry."
    ds = IceCubeDataset(ppc_root, batch_ids=[4], max_events=3000)
    out = prepare(ppc_root, tmp_path, batch_ids=[4], check=True, progress=False)
    mapped = IceCubeDataset(out, max_events=3000)
    rows = np.random.default_rng(0).permutation(3000)
    same_events(ds.__getitems__(rows), mapped.__getitems__(rows))
    assert np.array_equal(ds.geometry.xyz, Geometry.icecube86().xyz)
    assert np.array_equal(ds.geometry.xyz, mapped.geometry.xyz)


# The prepared form

def test_prepared_form_is_the_same_data(tiny_dataset, tmp_path):
    "With many ties of time, and with events in any order."
    rewrite(tiny_dataset, BATCH, lambda t: t.assign(time=t.time // 1000 * 1000))
    rewrite(tiny_dataset, META, lambda t: t.sample(frac=1, random_state=0))
    out = prepare(tiny_dataset, tmp_path / "out", check=True, progress=False)
    a, b = IceCubeDataset(tiny_dataset), IceCubeDataset(out)
    assert b.prepared and not a.prepared and find_batches(out) == [2, 3, 10]
    same_events(list(a), list(b))
    order = np.random.default_rng(0).permutation(len(a))
    same_events(a.__getitems__(order), b.__getitems__(order))
    assert a.event_table().equals(b.event_table())
    assert list(EventBatchSampler(a, 4)) == list(EventBatchSampler(b, 4))
    for options in ({"events": a.event_ids[9:12]}, {"batch_ids": [10, 3], "max_events": 9}):
        same_events(list(IceCubeDataset(tiny_dataset, **options)), list(IceCubeDataset(out, **options)))
    assert [path.name for path in out.rglob(".*")] == [".train_files.lock"]


def test_prepared_tables_describe_the_events(tiny_dataset, tmp_path):
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    tables = {part: pd.read_feather(out / f"train/batch_3.{part}.arrow") for part in TABLES}
    for e, (row, source) in zip(tables["events"].itertuples(), source_events(tiny_dataset, 3), strict=True):
        pulses = tables["pulses"].iloc[e.first_pulse:e.first_pulse + e.n_pulses]
        by_dom = source[np.lexsort((source[:, 0], source[:, 2]))]
        assert np.array_equal(pulses[COLUMNS].to_numpy(np.float32), by_dom)
        doms = tables["doms"].iloc[e.first_dom:e.first_dom + e.n_doms]
        check_doms(doms, source)
        assert doms.first_pulse.iloc[0] == e.first_pulse
        first_time, charge = doms.first_time.to_numpy(np.float32), doms.charge.to_numpy()
        assert e.event_time == reference_by_hand(first_time, charge, np.zeros(len(doms), int), 1)[0]
        assert e.first_time == source[:, 0].min() and np.isclose(e.charge, source[:, 1].sum())
        assert (e.event_id, e.azimuth) == (row.event_id, row.azimuth)


def check_doms(doms, pulses):
    "Assert that a table of DOMs is that of the pulses of an event."
    groups = pd.DataFrame(pulses[:, :3], columns=["time", "charge", "sensor"]).groupby("sensor")
    assert doms.sensor_id.tolist() == sorted(groups.groups)
    assert doms.n_pulses.tolist() == groups.size().tolist()
    assert doms.first_time.tolist() == groups.time.min().tolist()
    assert np.allclose(doms.charge, groups.charge.sum())


def test_prepare_resumes_and_notices_change(tiny_dataset, tmp_path):
    out = tmp_path / "out"

    def stamp(b): return (out / f"train/batch_{b}.events.arrow").stat().st_mtime_ns

    prepare(tiny_dataset, out, batch_ids=[2], progress=False)
    first = stamp(2)
    prepare(tiny_dataset, out, progress=False)
    assert stamp(2) == first     # finished: kept
    pulses = out / "train/batch_3.pulses.arrow"
    pulses.write_bytes(pulses.read_bytes()[:-100])     # not whole: refused, and made anew
    with pytest.raises(DataError, match="batch_3.pulses.arrow: missing or not whole.*prepare"):
        IceCubeDataset(out)
    third, tenth = stamp(3), stamp(10)
    prepare(tiny_dataset, out, progress=False)
    assert stamp(3) != third and stamp(10) == tenth
    events = out / "train/batch_10.events.arrow"
    events.write_bytes(events.read_bytes()[:50])
    with pytest.raises(DataError, match="batch_10.events.arrow.*prepare"): IceCubeDataset(out)
    prepare(tiny_dataset, out, progress=False)
    rewrite(tiny_dataset, BATCH, lambda t: t.assign(charge=t.charge * 2))     # another source
    prepare(tiny_dataset, out, check=True, progress=False)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))


@pytest.mark.parametrize(("batch", "part", "column", "message"), [
    (3, "pulses", "time", "differs"),
    (10, "doms", "charge", "(differs|damaged)"),
    (10, "events", "event_time", "(differs|damaged)"),
    (10, "pulses", "rank", "(differs|damaged)"),
])
def test_prepare_check_finds_a_changed_value(tiny_dataset, tmp_path, batch, part, column, message):
    "In any of the three tables."
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    path = out / f"train/batch_{batch}.{part}.arrow"
    data, values = bytearray(path.read_bytes()), read_arrow(path).column(column).to_numpy()
    place = data.find(values.tobytes())
    assert place > 0
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"batch_{batch}.{part}.arrow: {message}"):
        prepare(tiny_dataset, out, check=True, progress=False)


def test_prepare_check_does_not_trust_the_sorting(tiny_dataset, tmp_path, monkeypatch):
    "A fault in what makes the tables is in both of them; the events as pyarrow reads them show it."
    sort = PulseBlocks._sort

    def wrong(self, a, b):
        sort(self, a, b)
        self.columns["auxiliary"][self.ends[a] - self.n[a]] ^= 1

    monkeypatch.setattr(PulseBlocks, "_sort", wrong)
    with pytest.raises(DataError, match="batch_2.events.arrow: events 2000 and after differ"):
        prepare(tiny_dataset, tmp_path / "out", check=True, progress=False)


def test_prepare_shows_its_progress(tiny_dataset, tmp_path, monkeypatch):
    "Row by row when files are made, and file by file when they are kept."
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, file=open("/dev/null", "w"))     # noqa: SIM115
            self.steps = []
            bars.append(self)

        def update(self, n=1):
            self.steps.append(n)
            return super().update(n)

    monkeypatch.setattr(iceaggr.engine.prepare, "progress_bar", Bar)
    monkeypatch.setattr("iceaggr.io.kaggle.CHUNK_ROWS", 10)
    rows = sum(len(pd.read_parquet(path)) for path in (tiny_dataset / "train").iterdir())
    for _ in range(2): prepare(tiny_dataset, tmp_path / "out")
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == [rows, rows]
    assert max(bars[0].steps) == 10 and len(bars[0].steps) > rows / 10
    assert len([n for n in bars[1].steps if n]) == 3


def test_prepared_files_of_another_format_are_refused(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("iceaggr.io.prepared.PREPARED_FORMAT", 1)
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    monkeypatch.undo()
    message = "written in format 1, this version reads 3; run prepare again"
    with pytest.raises(DataError, match=message): IceCubeDataset(out)
    prepare(tiny_dataset, out, progress=False)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))


def test_prepare_removes_what_a_killed_process_left(tiny_dataset, tmp_path):
    "Of its own files only."
    out = tmp_path / "out/train"
    out.mkdir(parents=True)
    names = [".batch_3.pulses.arrow.part77", ".batch_3.events.arrow.part77", ".batch_33.doms.arrow.part78"]
    for name in names: (out / name).write_bytes(b"half")
    prepare(tiny_dataset, tmp_path / "out", progress=False)
    assert [path.name for path in out.glob(".*")] == names[2:]


def test_prepared_files_stay_open_up_to_a_limit(tiny_dataset, tmp_path, monkeypatch):
    ds = IceCubeDataset(prepare(tiny_dataset, tmp_path / "out", progress=False))
    expected = list(ds)
    assert len(ds._open) == 3 and not pickle.loads(pickle.dumps(ds))._open
    monkeypatch.setattr(iceaggr.data, "MAPPED_FILES", 2)
    ds = IceCubeDataset(tmp_path / "out")
    same_events(ds.__getitems__([20, 0, 9]), [expected[i] for i in (20, 0, 9)])
    assert len(ds._open) == 2


def test_prepare_leaves_nothing_half_done(tiny_dataset, tmp_path, monkeypatch):
    write, count = iceaggr.io.prepared.write_arrow, [0]

    def failing(table, path):
        count[0] += 1
        if count[0] == 5: raise OSError("disk full")
        write(table, path)

    monkeypatch.setattr(iceaggr.io.prepared, "write_arrow", failing)
    out = tmp_path / "out"
    with pytest.raises(OSError): prepare(tiny_dataset, out, progress=False)
    assert find_batches(out) == [2]     # the second set lacks its event table
    monkeypatch.undo()
    prepare(tiny_dataset, out, check=True, progress=False)
    assert find_batches(out) == [2, 3, 10]


def test_prepare_refuses_folders_and_bad_data(tiny_dataset, tmp_path):
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    with pytest.raises(DataError, match="folder of its own"): prepare(tiny_dataset, tiny_dataset)
    with pytest.raises(DataError, match="already"): prepare(out, tmp_path / "again")
    rewrite(tiny_dataset, BATCH, put("charge", 0, 0.0))
    with pytest.raises(DataError, match="batch_3.parquet: column charge"):
        prepare(tiny_dataset, tmp_path / "bad", progress=False)


def test_part_of_a_prepared_set_does_not_pass_for_all(tiny_dataset, tmp_path):
    out, sound = tmp_path / "out", (tiny_dataset / BATCH).read_bytes()
    rewrite(tiny_dataset, BATCH, put("charge", 0, 0.0))
    prepare(tiny_dataset, out, batch_ids=[10], progress=False)
    with pytest.raises(DataError, match="column charge"):
        prepare(tiny_dataset, out, batch_ids=[2, 3], progress=False)
    with pytest.raises(DataError, match="out/train: no file of batch 3, which prepare was to make"):
        IceCubeDataset(out)
    assert IceCubeDataset(out, batch_ids=[2, 10]).batch_ids == [2, 10]
    with pytest.warns(UserWarning, match="1 of 16 events"): part = IceCubeDataset(out, on_bad_event="skip")
    assert part.batch_ids == [2, 10]
    assert "batch_3.events.arrow" in part.skipped.file[0] and "no such file" in part.skipped.reason[0]
    (tiny_dataset / BATCH).write_bytes(sound)
    prepare(tiny_dataset, out, batch_ids=[3], progress=False)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))


def test_the_list_of_files_to_prepare(tiny_dataset, tmp_path):
    "Damaged, it is named; without it, the files that are there are all."
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    path = out / "train_files.json"
    path.write_text(path.read_text()[:-2])
    with pytest.raises(DataError, match="train_files.json: damaged"): IceCubeDataset(out)
    path.unlink()
    assert len(IceCubeDataset(out)) == len(IceCubeDataset(tiny_dataset))


def rewritten(path, change):
    "Change columns of one table of a prepared set, as if they had been written so and without checksums."
    events = path.with_name(path.name.replace(".pulses.", ".events.").replace(".doms.", ".events."))
    facts = prepared_facts(events, whole=False)
    table = change(read_arrow(path).to_pandas().copy())
    sizes = facts["bytes"]
    if path != events:
        write_arrow(pa.Table.from_pandas(table, preserve_index=False), path)
        sizes |= {path.name.split(".")[-2]: path.stat().st_size}
        table = read_arrow(events).to_pandas().copy()
    facts = json.dumps({"format": facts["format"], "source": facts["source"], "bytes": sizes})
    new = pa.Table.from_pandas(table, preserve_index=False).replace_schema_metadata({"iceaggr": facts})
    events.unlink()
    write_arrow(new, events)


@pytest.mark.parametrize("part, column, value, word", [
    ("events", "first_pulse", -1, "first_pulse and n_pulses of its events"),
    ("events", "n_pulses", 10**9, "first_pulse and n_pulses of its events"),
    ("events", "first_dom", 10**6, "first_dom and n_doms of its events"),
    ("doms", "n_pulses", 0, "first_pulse and n_pulses of its DOMs"),
    ("doms", "first_pulse", 7, "first_pulse and n_pulses of its DOMs"),
    ("doms", "sensor_id", -3, "another sensor than its pulses"),
    ("doms", "sensor_id", 77, "another sensor than its pulses"),
    ("events", "azimuth", np.inf, "not finite"),
    ("pulses", "time", -5, "cannot be"),
    ("pulses", "charge", np.inf, "cannot be"),
    ("pulses", "sensor_id", 5160, "cannot be"),
    ("pulses", "rank", 10**6, "ranks"),
    ("pulses", "rank", -1, "ranks"),
])
def test_prepared_tables_that_contradict_each_other_are_refused(tiny_dataset, tmp_path, part, column, value,
                                                                word):
    "Also without checksums: a wrong offset would read the pulses of other events, or beyond the file."
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    path = out / f"train/batch_3.{part}.arrow"

    def change(table):
        table.loc[1, column] = np.asarray(value).astype(table[column].dtype)
        return table

    rewritten(path, lambda table: table)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))
    rewritten(path, change)
    with pytest.raises(DataError, match=word): list(IceCubeDataset(out))


@pytest.mark.parametrize("part, n, first, word", [
    ("events", "n_doms", "first_dom", "the pulses of an event's DOMs"),
    ("events", "n_pulses", "first_pulse", "the pulses of an event's DOMs"),
    ("doms", "n_pulses", "first_pulse", "another sensor than its pulses")])
def test_a_row_that_moves_to_its_neighbour_is_noticed(tiny_dataset, tmp_path, part, n, first, word):
    "The ranges still cover all rows, each once; without checksums only the other tables tell."
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)

    def move(table):
        k = next(i for i in np.argsort(table[first]).to_numpy()[:-1] if table[n][i] > 1)
        following = int(np.flatnonzero(table[first] == table[first][k] + table[n][k])[0])
        table.loc[k, n] -= 1
        table.loc[following, [first, n]] += [-1, 1]
        return table

    rewritten(out / f"train/batch_3.{part}.arrow", move)
    with pytest.raises(DataError, match=word): list(IceCubeDataset(out))


@pytest.mark.parametrize("part", ["pulses", "doms", "events"])
def test_file_that_shrinks_while_it_is_mapped(tiny_dataset, tmp_path, part):
    "In a process of its own: reading beyond the end would kill it."
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    [code] = ended(launch(tmp_path / "output", read_cut_file, out, part))
    assert code == 0, (tmp_path / "output").read_text()


def read_cut_file(out, part):
    dataset = IceCubeDataset(out, batch_ids=[3])
    dataset[0]
    os.truncate(out / f"train/batch_3.{part}.arrow", 100)
    message = f"batch_3.{part}.arrow: has shrunk from .* run prepare again"
    for read in (lambda: dataset[1], lambda: dataset.hits([1])):
        with pytest.raises(DataError, match=message): read()


def test_file_that_shrinks_during_a_reading(tmp_path):
    "Also between the look at its size and the last page: the reader goes on with an error, every time."
    source = simulate_dataset(tmp_path / "data", 2_000, events_per_file=2_000, workers=1, progress=False)
    out = prepare(source, tmp_path / "out", progress=False)
    [code] = ended(launch(tmp_path / "output", read_while_files_are_cut, out, tmp_path))
    assert code == 0, (tmp_path / "output").read_text()


def read_while_files_are_cut(out, tmp_path):
    rng = np.random.default_rng(0)
    for k in range(12):
        part = shutil.copytree(out, tmp_path / f"copy{k}")
        dataset, events = IceCubeDataset(part), np.arange(1_999, 0, -1)
        dataset.hits([0])
        path = part / f"train/batch_1.{('pulses', 'doms')[k % 2]}.arrow"
        cut = threading.Timer(rng.uniform(0, 0.02), os.truncate, (path, 70_000))
        cut.start()
        with pytest.raises(DataError, match=r"has shrunk from .* run prepare again"):
            while True: dataset.hits(events)
        cut.join()


def test_rows_are_copied_without_the_kernels_help(monkeypatch):
    "Elsewhere than on Linux, or where the call is not allowed: the same rows."
    rng = np.random.default_rng(0)
    table = {"a": rng.integers(0, 99, 5_000).astype(np.int16), "b": rng.random(5_000)}
    first, count = rng.integers(0, 4_900, 2_500), rng.integers(1, 99, 2_500)
    fast = copy_rows(table, first, count)
    monkeypatch.setattr(iceaggr.io.prepared, "_COPY", None)
    plain = copy_rows(table, first, count)
    for name in table: np.testing.assert_array_equal(fast[name], plain[name])
    np.testing.assert_array_equal(plain["b"][:count[0]], table["b"][first[0]:first[0] + count[0]])
    assert not len(copy_rows(table, first[:0], count[:0])["a"])


def test_several_processes_prepare_one_folder(tiny_dataset, tmp_path):
    "No file is lost from the list of those to come."
    out, batches = tmp_path / "out", find_batches(tiny_dataset)
    processes = [p for b in batches
                 for p in launch(tmp_path / "output", prepare_slowly, tiny_dataset, out, b)]
    assert ended(processes) == [0] * len(batches), (tmp_path / "output").read_text()
    assert promised_files(out) == batches
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))


def test_pipe_in_place_of_the_list_of_files(tiny_dataset, tmp_path):
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    (out / "train_files.json").unlink()
    os.mkfifo(out / "train_files.json")
    with pytest.raises(DataError, match="not a regular file"): IceCubeDataset(out)


def prepare_slowly(root, out, batch):
    "Without the lock, the others would read the list between this one's reading and writing."
    def read_and_wait(*args):
        found = promised_files(*args)
        time.sleep(0.5)
        return found

    iceaggr.engine.prepare.promised_files = read_and_wait
    prepare(root, out, [batch], progress=False)


def test_a_change_of_equal_size_and_date_is_seen_by_check(tiny_dataset, tmp_path):
    "Without it, a finished file is kept."
    root, out = shutil.copytree(tiny_dataset, tmp_path / "data"), tmp_path / "out"
    path = root / "train/batch_3.parquet"
    table, plain = pd.read_parquet(path), dict(compression=None, use_dictionary=False)
    table.to_parquet(path, **plain)
    before = path.stat()
    prepare(root, out, progress=False)
    table.assign(charge=table.charge[::-1].to_numpy()).to_parquet(path, **plain)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    prepare(root, out, progress=False)
    with pytest.raises(DataError, match="differs from the source"):
        prepare(root, out, check=True, progress=False)
