"""Reading the Kaggle layout: what is refused, what is accepted, and that nothing is lost on the way."""
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iceaggr.data import IceCubeDataset, split_batches
from iceaggr.engine.loading import EventBatchSampler
from iceaggr.engine.prepare import prepare
from iceaggr.testing import BATCH, META, put, write_tiny
from iceaggr.geometry import Geometry, load_geometry
from iceaggr.io.prepared import map_arrow
from iceaggr.common import DataError
from iceaggr.io.kaggle import find_batches, read_meta
from iceaggr.pulses import PulseBlocks, dom_order, event_time_reference
from iceaggr.simulation.dataset import simulate_dataset
from processes import call


def rewrite(root, file, change, **options):
    "Change a table of a data set."
    table = change(pd.read_parquet(root / file).reset_index(drop=file == META))
    table.to_parquet(root / file, index=False, **options)


def same_events(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def source_events(root, batch, split="train"):
    "Events read in the plainest way."
    meta, pulses = pd.read_parquet(root / f"{split}_meta.parquet"), pd.read_parquet(root / split / f"batch_{batch}.parquet")
    for row in meta[meta.batch_id == batch].itertuples():
        yield row, pulses.iloc[row.first_pulse_index:row.last_pulse_index + 1][["time", "charge", "sensor_id", "auxiliary"]].to_numpy(np.float32)


def test_missing_and_damaged_files(tiny_dataset, monkeypatch):
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
    path = tiny_dataset / BATCH
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"event_id,sensor_id\n1,2\n", b"", whole[:200] + b"\0" * 400 + whole[600:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=re.escape(str(path))): list(IceCubeDataset(tiny_dataset))
    ds = IceCubeDataset(tiny_dataset)
    path.unlink()
    with pytest.raises(DataError, match="no such file"): list(ds)
    (tiny_dataset / META).unlink()
    with pytest.raises(DataError, match=META): IceCubeDataset(tiny_dataset)
    for file in (tiny_dataset / "train").iterdir(): file.unlink()
    with pytest.raises(DataError, match="no batch files"): IceCubeDataset(tiny_dataset)


def test_the_contract(tiny_dataset, monkeypatch):
    monkeypatch.setenv("ICEAGGR_DATA", str(tiny_dataset))
    ds = IceCubeDataset()
    assert find_batches() == ds.batch_ids == [2, 3, 10] and len(ds) == 21 and ds.cache_size == 1
    k = 0
    for b in ds.batch_ids:
        for row, pulses in source_events(tiny_dataset, b):
            e = ds[k]
            assert list(e) == ["pulse_features", "event_id", "n_pulses", "target"]
            assert [(v.dtype, tuple(v.shape)) for v in e.values()] == [(torch.float32, pulses.shape), (torch.int64, ()), (torch.int64, ()), (torch.float32, (2,))]
            assert np.array_equal(e["pulse_features"], pulses) and e["event_id"] == row.event_id and e["n_pulses"] == len(pulses)
            assert e["target"].tolist() == np.float32([row.azimuth, row.zenith]).tolist()
            k += 1
    assert k == len(ds) and ds.event_ids.dtype == ds.n_pulses.dtype == np.int64 and len(ds.geometry) == 5160
    meta = pd.read_parquet(tiny_dataset / META)
    assert ds.event_table()[["batch_id", "event_id", "azimuth", "zenith"]].equals(meta[["batch_id", "event_id", "azimuth", "zenith"]])
    same_events([ds[-1], ds[np.int64(3)], ds[torch.tensor(4)]], [ds[20], ds[3], ds[4]])
    for i in (21, -22):
        with pytest.raises(IndexError): ds[i]
    with pytest.raises(TypeError): ds[1.0]
    order = [20, 0, 9, 9, -21, 13]
    same_events(ds.__getitems__(order), [ds[i] for i in order])


def test_test_split_without_targets(tmp_path):
    root = write_tiny(tmp_path, {661: 4}, split="test")
    ds = IceCubeDataset(root, split="test")
    assert list(ds[0]) == ["pulse_features", "event_id", "n_pulses"] and "azimuth" not in ds.event_table()
    out = prepare(root, tmp_path / "out", split="test", check=True, progress=False)
    same_events(list(IceCubeDataset(out, "test")), list(ds))


def test_parts_of_a_data_set(tiny_dataset):
    ds = IceCubeDataset(tiny_dataset)
    same_events(list(IceCubeDataset(tiny_dataset, batch_ids=[10, 2])), [ds[i] for i in [*range(14, 21), *range(8)]])
    same_events(list(IceCubeDataset(tiny_dataset, max_events=10)), [ds[i] for i in range(10)])
    assert IceCubeDataset(tiny_dataset, max_events=8).batch_ids == [2] and len(IceCubeDataset(tiny_dataset, max_events=10**9)) == 21
    same_events(list(IceCubeDataset(tiny_dataset, events=[10003, 3006, 3012])), [ds[i] for i in (10, 12, 15)])
    rewrite(tiny_dataset, META, lambda t: t.sample(frac=1, random_state=0))             # the order of the table is the order of the data set
    mixed = IceCubeDataset(tiny_dataset)
    back = pd.Series(range(21), index=ds.event_ids)[mixed.event_ids]
    assert mixed.batch_ids == [2, 3, 10] and (np.diff(back) < 0).any()
    same_events(list(mixed), [ds[i] for i in back])


def test_only_what_is_wanted_is_read(tmp_path, monkeypatch):
    "Row groups that are not wanted may be destroyed without anyone noticing."
    monkeypatch.setattr("iceaggr.io.kaggle.CHUNK_ROWS", 20)                                  # the table of 100 rows counts as large
    root = write_tiny(tmp_path, {b: 5 for b in range(1, 21)})
    rewrite(root, META, lambda t: t, row_group_size=5)
    rewrite(root, "train/batch_7.parquet", lambda t: t, row_group_size=20)
    whole = IceCubeDataset(root, batch_ids=[7, 8])
    first_two = [whole[0], whole[1]]
    meta = read_meta(root / META, [7, 8])
    assert (meta.last_pulse_index[:2] < 80).all()
    for file, keep in ((META, {6, 7}), ("train/batch_7.parquet", set(range(4)))):
        data = bytearray((root / file).read_bytes())
        info = pq.ParquetFile(root / file).metadata
        for g in set(range(info.num_row_groups)) - keep:
            for c in range(info.num_columns):
                chunk = info.row_group(g).column(c)
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                data[start:start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        (root / file).write_bytes(data)
    assert read_meta(root / META, [7, 8]).equals(meta)
    with pytest.raises(DataError, match="damaged"): read_meta(root / META, [6])
    same_events(list(IceCubeDataset(root, batch_ids=[7, 8], max_events=2)), first_two)
    with pytest.raises(DataError, match="damaged"): list(IceCubeDataset(root, batch_ids=[7]))


def test_pieces_of_any_size_agree(tiny_dataset, monkeypatch):
    "Events that lie across pieces and row groups are put together again, also a few from the middle."
    before = list(IceCubeDataset(tiny_dataset))
    rewrite(tiny_dataset, BATCH, lambda t: t, row_group_size=11)
    for rows in (1, 7, 64):
        monkeypatch.setattr("iceaggr.io.kaggle.CHUNK_ROWS", rows)
        same_events(list(IceCubeDataset(tiny_dataset)), before)
        same_events(list(IceCubeDataset(tiny_dataset, events=[3003, 3012, 2021])), [before[i] for i in (7, 9, 12)])
    rewrite(tiny_dataset, BATCH, put("charge", -1, 0.0))
    with pytest.raises(DataError, match="event 3015"): list(IceCubeDataset(tiny_dataset))


def test_rows_of_no_event_are_passed_over(tiny_dataset):
    ds = IceCubeDataset(tiny_dataset)
    keep = [i for i in range(21) if i not in (0, 9, 10, 20)]
    expected = [ds[i] for i in keep]
    rewrite(tiny_dataset, META, lambda t: t.iloc[keep])
    same_events(list(IceCubeDataset(tiny_dataset)), expected)


def test_times_out_of_order_are_sorted_stably(tiny_dataset):
    def shuffle(t):
        t = t.assign(time=t.time // 500 * 500)                              # ties
        return pd.concat([t[t.event_id == 3000].iloc[::-1], t[t.event_id != 3000].sort_values(["event_id", "time"], kind="stable")])
    rewrite(tiny_dataset, BATCH, shuffle)
    with pytest.warns(UserWarning, match=r"batch_3\.parquet: column time: 1 events"): ds = list(IceCubeDataset(tiny_dataset, batch_ids=[3]))
    for e, (_, pulses) in zip(ds, source_events(tiny_dataset, 3)):
        assert np.array_equal(e["pulse_features"], pulses[np.argsort(pulses[:, 0], kind="stable")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(IceCubeDataset(tiny_dataset, batch_ids=[2, 10]))


def test_the_cache_holds_so_many_files(tiny_dataset, monkeypatch):
    import iceaggr.data as data
    opened, read = [], data.read_pulses
    monkeypatch.setattr(data, "read_pulses", lambda path, *a: opened.append(path.name) or read(path, *a))
    for size, count in ((1, 6), (2, 6), (3, 3)):
        opened.clear()
        ds = IceCubeDataset(tiny_dataset, cache_size=size)
        assert not opened
        for i in (0, 8, 14, 1, 9, 15): ds[i]
        assert len(opened) == count and len(ds._open) == size
    opened.clear()
    ds = IceCubeDataset(tiny_dataset, cache_size=2)
    for i in (0, 8, 0, 14, 0, 8): ds[i]                                     # the least recently used goes first
    assert opened == [f"batch_{b}.parquet" for b in (2, 3, 10, 3)]


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("form", ["parquet", "prepared"])
def test_worker_processes(tiny_dataset, tmp_path, method, form):
    root = tiny_dataset if form == "parquet" else prepare(tiny_dataset, tmp_path / "out", progress=False)
    ds = IceCubeDataset(root)
    expected = list(ds)                                                     # files are open when the workers start
    sampler = EventBatchSampler(ds, 4, seed=3)
    loader = torch.utils.data.DataLoader(ds, batch_sampler=sampler, num_workers=2, multiprocessing_context=method, collate_fn=list)
    for indices, events in zip(sampler, loader, strict=True): same_events(events, [expected[i] for i in indices])
    same_events(list(pickle.loads(pickle.dumps(ds))), expected)


def test_split_by_file():
    assert split_batches([1, 2, 10]) == ([1, 2], [10]) and split_batches(range(1, 5), 2) == ([1, 3, 4], [2]) and split_batches([3, 1], [1]) == ([3], [1])
    for ids, valid, words in (([1, 2], [3], "not among"), ([1], None, "no file is left"), ([1, 2], [1, 2], "no file is left"), ([1, 1, 2], None, "must not overlap")):
        with pytest.raises(DataError, match=words): split_batches(ids, valid)


@pytest.fixture
def many(tmp_path): return IceCubeDataset(write_tiny(tmp_path, {b: 30 + b for b in range(1, 8)}), cache_size=2)


@pytest.mark.parametrize("options", [{}, dict(window=1), dict(window=2, chunk=3), dict(max_pulses=60), dict(shuffle=False), dict(shuffle=False, like_size=True),
                                     dict(shuffle=False, max_pulses=30), dict(like_size=False)])
def test_sampler_gives_every_event_once(many, options):
    sampler = EventBatchSampler(many, 8, seed=1, **options)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and sorted(sum(batches, [])) == list(range(len(many))) and max(map(len, batches)) <= 8
        assert batches == list(EventBatchSampler(many, 8, seed=1, **options)) or epoch
        if options.get("max_pulses"): assert all(many.n_pulses[b].sum() <= options["max_pulses"] or len(b) == 1 for b in batches)
        if not options.get("shuffle", True) and not options.get("like_size"): assert sum(batches, []) == list(range(len(many)))
    if options.get("shuffle", True):
        assert batches != list(EventBatchSampler(many, 8, seed=1, **options)) and batches != list(EventBatchSampler(many, 8, seed=2, **options))


def test_sampler_windows_never_mix(many):
    for window in (1, 2):
        sampler, used = EventBatchSampler(many, 8, window=window), []
        for batch in sampler:
            for f in np.unique(many.file_of(np.array(batch))):
                if f not in used: used.append(int(f))
                assert used.index(f) >= (len(used) - 1) // window * window        # no return to an earlier window
        assert sorted(used) == list(range(7)) and used != sorted(used)
    with pytest.warns(UserWarning, match="cache_size=3"): EventBatchSampler(many, 8, window=3)
    for wrong in (dict(batch_size=0), dict(batch_size=2, max_pulses=0)):
        with pytest.raises(ValueError, match="at least 1"): EventBatchSampler(many, **wrong)


def test_sampler_puts_like_events_together(many):
    spread = lambda **o: np.mean([np.ptp(many.n_pulses[b]) for b in EventBatchSampler(many, 8, **o)])
    assert spread() < spread(like_size=False) / 3


def test_sampler_order_is_the_same_in_another_process(many):
    code = "import sys; from iceaggr.data import *; from iceaggr.engine.loading import EventBatchSampler; s = EventBatchSampler(IceCubeDataset(sys.argv[1], cache_size=2), 8, seed=5); s.set_epoch(3); print(list(s))"
    sampler = EventBatchSampler(many, 8, seed=5)
    sampler.set_epoch(3)
    assert subprocess.run([sys.executable, "-c", code, str(many.root)], capture_output=True, text=True, check=True).stdout.strip() == str(list(sampler))


def test_prepared_form_is_the_same_data(tiny_dataset, tmp_path):
    rewrite(tiny_dataset, BATCH, lambda t: t.assign(time=t.time // 1000 * 1000))               # many ties
    rewrite(tiny_dataset, META, lambda t: t.sample(frac=1, random_state=0))                    # events in any order
    out = prepare(tiny_dataset, tmp_path / "out", check=True, progress=False)
    a, b = IceCubeDataset(tiny_dataset), IceCubeDataset(out)
    assert b.prepared and not a.prepared and find_batches(out) == [2, 3, 10]
    same_events(list(a), list(b))
    order = np.random.default_rng(0).permutation(len(a))
    same_events(a.__getitems__(order), b.__getitems__(order))
    assert a.event_table().equals(b.event_table())
    assert list(EventBatchSampler(a, 4)) == list(EventBatchSampler(b, 4))
    same_events(list(IceCubeDataset(tiny_dataset, events=a.event_ids[9:12])), list(IceCubeDataset(out, events=a.event_ids[9:12])))
    same_events(list(IceCubeDataset(tiny_dataset, batch_ids=[10, 3], max_events=9)), list(IceCubeDataset(out, batch_ids=[10, 3], max_events=9)))
    assert not list(out.rglob(".*"))


def test_prepared_tables_describe_the_events(tiny_dataset, tmp_path):
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    tables = {p: pd.read_feather(out / f"train/batch_3.{p}.arrow") for p in ("pulses", "doms", "events")}
    for e, (row, source) in zip(tables["events"].itertuples(), source_events(tiny_dataset, 3), strict=True):
        pulses = tables["pulses"].iloc[e.first_pulse:e.first_pulse + e.n_pulses]
        expected = source[np.lexsort((source[:, 0], source[:, 2]))]
        assert np.array_equal(pulses[["time", "charge", "sensor_id", "auxiliary"]].to_numpy(np.float32), expected)
        doms = tables["doms"].iloc[e.first_dom:e.first_dom + e.n_doms]
        groups = pd.DataFrame(source[:, :3], columns=["time", "charge", "sensor"]).groupby("sensor")
        assert doms.sensor_id.tolist() == sorted(groups.groups) and doms.n_pulses.tolist() == groups.size().tolist() and doms.first_time.tolist() == groups.time.min().tolist()
        assert np.allclose(doms.charge, groups.charge.sum()) and doms.first_pulse.iloc[0] == e.first_pulse
        assert e.event_time == reference_by_hand(doms.first_time.to_numpy(np.float32), doms.charge.to_numpy(), np.zeros(len(doms), int), 1)[0]
        assert e.first_time == source[:, 0].min() and np.isclose(e.charge, source[:, 1].sum()) and (e.event_id, e.azimuth) == (row.event_id, row.azimuth)


def test_prepare_resumes_and_notices_change(tiny_dataset, tmp_path):
    out = tmp_path / "out"
    prepare(tiny_dataset, out, batch_ids=[2], progress=False)
    stamp = lambda b, part="events": (out / f"train/batch_{b}.{part}.arrow").stat().st_mtime_ns
    first = stamp(2)
    prepare(tiny_dataset, out, progress=False)
    assert stamp(2) == first                                                # finished: kept
    pulses = out / "train/batch_3.pulses.arrow"
    pulses.write_bytes(pulses.read_bytes()[:-100])                          # not whole: refused, and made anew
    with pytest.raises(DataError, match="batch_3.pulses.arrow: missing or not whole.*prepare"): IceCubeDataset(out)
    third, tenth = stamp(3), stamp(10)
    prepare(tiny_dataset, out, progress=False)
    assert stamp(3) != third and stamp(10) == tenth
    events = out / "train/batch_10.events.arrow"
    events.write_bytes(events.read_bytes()[:50])
    with pytest.raises(DataError, match="batch_10.events.arrow.*prepare"): IceCubeDataset(out)
    prepare(tiny_dataset, out, progress=False)
    rewrite(tiny_dataset, BATCH, lambda t: t.assign(charge=t.charge * 2))   # another source
    prepare(tiny_dataset, out, check=True, progress=False)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))


def test_prepare_check_finds_a_changed_value(tiny_dataset, tmp_path):
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    path = out / "train/batch_3.pulses.arrow"
    data, table = bytearray(path.read_bytes()), pd.read_feather(path)
    at = data.find(table.time.to_numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="batch_3.pulses.arrow: differs"): prepare(tiny_dataset, out, check=True, progress=False)


@pytest.mark.parametrize("part, column", [("doms", "charge"), ("events", "event_time"), ("pulses", "rank")])
def test_prepare_check_looks_at_all_tables(tiny_dataset, tmp_path, part, column):
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    path = out / f"train/batch_10.{part}.arrow"
    data, values = bytearray(path.read_bytes()), map_arrow(path).column(column).to_numpy()
    data[data.find(values.tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"batch_10.{part}.arrow: (differs|damaged)"): prepare(tiny_dataset, out, check=True, progress=False)


def test_prepare_check_does_not_trust_the_sorting(tiny_dataset, tmp_path, monkeypatch):
    "A fault in what makes the tables is in both of them; the events as pyarrow reads them show it."
    sort = PulseBlocks._sort
    def wrong(self, a, b):
        sort(self, a, b)
        self.columns["auxiliary"][self.ends[a] - self.n[a]] ^= 1
    monkeypatch.setattr(PulseBlocks, "_sort", wrong)
    with pytest.raises(DataError, match="batch_2.events.arrow: events 2000 and after differ"): prepare(tiny_dataset, tmp_path / "out", check=True, progress=False)


def test_prepare_shows_how_far_it_is(tiny_dataset, tmp_path, monkeypatch):
    import iceaggr.engine.prepare as data
    bars = []
    class Bar(data.tqdm):
        def __init__(self, *args, **options): super().__init__(*args, **options, file=open("/dev/null", "w")); self.seen = []; bars.append(self)
        def update(self, n=1): self.seen.append(n); return super().update(n)
    monkeypatch.setattr(data, "tqdm", Bar)
    monkeypatch.setattr("iceaggr.io.kaggle.CHUNK_ROWS", 10)
    rows = sum(len(pd.read_parquet(p)) for p in (tiny_dataset / "train").iterdir())
    for _ in range(2): prepare(tiny_dataset, tmp_path / "out")                             # anew, then kept
    assert [b.n for b in bars] == [b.total for b in bars] == [rows, rows]
    assert max(bars[0].seen) == 10 and len(bars[0].seen) > rows / 10 and len([n for n in bars[1].seen if n]) == 3


def test_prepared_files_of_another_format_are_refused(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("iceaggr.io.prepared.PREPARED_FORMAT", 1)
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    monkeypatch.undo()
    with pytest.raises(DataError, match="written in format 1, this version reads 3; run prepare again"): IceCubeDataset(out)
    prepare(tiny_dataset, out, progress=False)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))


def test_prepare_removes_what_a_killed_process_left(tiny_dataset, tmp_path):
    out, rest = tmp_path / "out/train", [".batch_3.pulses.arrow.part77", ".batch_3.events.arrow.part77", ".batch_33.doms.arrow.part78"]
    out.mkdir(parents=True)
    for name in rest: (out / name).write_bytes(b"half")
    prepare(tiny_dataset, tmp_path / "out", progress=False)
    assert [p.name for p in out.glob(".*")] == rest[2:]                                     # another's


def test_prepared_files_stay_open_up_to_a_limit(tiny_dataset, tmp_path, monkeypatch):
    import iceaggr.data as data
    ds = IceCubeDataset(prepare(tiny_dataset, tmp_path / "out", progress=False))
    expected = list(ds)
    assert len(ds._open) == 3 and not pickle.loads(pickle.dumps(ds))._open
    monkeypatch.setattr(data, "MAPPED_FILES", 2)
    ds = IceCubeDataset(tmp_path / "out")
    same_events(ds.__getitems__([20, 0, 9]), [expected[i] for i in (20, 0, 9)])
    assert len(ds._open) == 2


def test_prepare_leaves_nothing_half_done(tiny_dataset, tmp_path, monkeypatch):
    import iceaggr.io.prepared as prepared
    write, count = prepared.write_arrow, [0]
    def failing(table, path):
        count[0] += 1
        if count[0] == 5: raise OSError("disk full")
        write(table, path)
    monkeypatch.setattr(prepared, "write_arrow", failing)
    out = tmp_path / "out"
    with pytest.raises(OSError): prepare(tiny_dataset, out, progress=False)
    assert find_batches(out) == [2]                                         # the second set lacks its event table
    monkeypatch.undo()
    prepare(tiny_dataset, out, check=True, progress=False)
    assert find_batches(out) == [2, 3, 10]
    with pytest.raises(DataError, match="folder of its own"): prepare(tiny_dataset, tiny_dataset)
    with pytest.raises(DataError, match="already"): prepare(out, tmp_path / "again")
    rewrite(tiny_dataset, BATCH, put("charge", 0, 0.0))
    with pytest.raises(DataError, match="batch_3.parquet: column charge"): prepare(tiny_dataset, tmp_path / "bad", progress=False)


def test_part_of_a_prepared_set_does_not_pass_for_all(tiny_dataset, tmp_path):
    out = tmp_path / "out"
    sound = (tiny_dataset / BATCH).read_bytes()
    rewrite(tiny_dataset, BATCH, put("charge", 0, 0.0))
    prepare(tiny_dataset, out, batch_ids=[10], progress=False)
    with pytest.raises(DataError, match="column charge"): prepare(tiny_dataset, out, batch_ids=[2, 3], progress=False)
    with pytest.raises(DataError, match="out/train: no file of batch 3, which prepare was to make"): IceCubeDataset(out)
    assert IceCubeDataset(out, batch_ids=[2, 10]).batch_ids == [2, 10]
    with pytest.warns(UserWarning, match="1 of 16 events"): part = IceCubeDataset(out, on_bad_event="skip")
    assert part.batch_ids == [2, 10] and "batch_3.events.arrow" in part.skipped.file[0] and "no such file" in part.skipped.reason[0]
    (tiny_dataset / BATCH).write_bytes(sound)
    prepare(tiny_dataset, out, batch_ids=[3], progress=False)
    same_events(list(IceCubeDataset(out)), list(IceCubeDataset(tiny_dataset)))
    note = out / "train_files.json"
    note.write_text(note.read_text()[:-2])
    with pytest.raises(DataError, match="train_files.json: damaged"): IceCubeDataset(out)
    note.unlink()                                                           # written before there was one
    assert len(IceCubeDataset(out)) == len(IceCubeDataset(tiny_dataset))


def test_real_physics_events(ppc_root, tmp_path):
    ds = IceCubeDataset(ppc_root, batch_ids=[4], max_events=3000)
    out = prepare(ppc_root, tmp_path, batch_ids=[4], check=True, progress=False)
    mapped = IceCubeDataset(out, max_events=3000)
    rows = np.random.default_rng(0).permutation(3000)
    same_events(ds.__getitems__(rows), mapped.__getitems__(rows))
    assert not np.array_equal(ds.geometry.xyz, IceCubeDataset(write_tiny(tmp_path / "t")).geometry.xyz) and np.array_equal(ds.geometry.xyz, mapped.geometry.xyz)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5159), min_size=1, max_size=40), min_size=1, max_size=8), st.integers(0, 2**40))
def test_order_by_event_and_dom(sensors, first_event):
    event, sensor = first_event + np.repeat(np.arange(len(sensors)), [len(s) for s in sensors]), np.concatenate(sensors)
    order, start = dom_order(event, sensor)
    assert np.array_equal(order, np.lexsort((np.arange(len(event)), sensor, event)))                     # stable
    groups = pd.DataFrame(dict(event=event, sensor=sensor)).groupby(["event", "sensor"]).size()
    assert start.tolist() == (groups.cumsum() - groups).tolist()


def test_too_much_for_one_sort_is_refused():
    with pytest.raises(ValueError, match="pack fewer events"): dom_order(np.array([0, 2**40]), np.array([2**24, 1]))


def reference_by_hand(time, charge, event, n_events):
    "Event by event: the first time at which half of the charge has come, in whole thousandths of a photo-electron."
    out = []
    for e in range(n_events):
        k = np.flatnonzero(event == e)
        k = k[np.argsort(time[k], kind="stable")]
        w = np.clip(np.round(charge[k].astype(np.float64) * 1000), 1, 2.0**40).astype(np.int64)
        out.append(time[k][np.searchsorted(np.cumsum(w), (w.sum() + 1) // 2)] if len(k) else 0)
    return np.array(out, time.dtype)


times = st.one_of(st.integers(5_000, 80_000), st.integers(-50, 50).map(float), st.floats(-2.0**100, 2.0**100, width=32), st.just(-0.0))

@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(times, st.floats(np.float32(0.001), 3_000, width=32, exclude_min=True), st.integers(0, 5)), max_size=60), st.integers(0, 6), st.sampled_from([6, 7, 2**50]))
def test_reference_time_of_an_event(doms, seed, claimed):
    "Any times, ties, events in any order; also where event, time and number do not fit into 63 bits."
    time, charge, event = (np.array([d[i] for d in doms], t) for i, t in enumerate((np.float32, np.float32, np.int64)))
    mixed = np.random.default_rng(seed).permutation(len(doms))
    expected = reference_by_hand(time, charge, event, 6)
    if claimed == 2**50:                                                                  # the other way of sorting, by itself
        from iceaggr.pulses import _by_event_and_time
        order = _by_event_and_time(torch.from_numpy(time), torch.from_numpy(event), claimed).numpy() if len(doms) else np.empty(0, int)
        assert np.array_equal(time[order], time[np.lexsort((time, event))]) and np.array_equal(event[order], np.sort(event))
    else:
        t, q, e = map(torch.from_numpy, (time[mixed], charge[mixed], event[mixed]))
        found = event_time_reference(t, q, e, claimed)
        assert found.dtype == torch.float32 and np.array_equal(found.numpy()[:6], expected)
        finer = t.double() + torch.rand(len(t), dtype=torch.float64) * 1e-9                  # of equal float32
        assert np.array_equal(event_time_reference(finer, q, e, claimed).numpy()[:6], reference_by_hand(finer.numpy(), q.numpy(), e.numpy(), 6))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), min_size=1, max_size=15), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 40), st.randoms())
def test_blocks_and_pieces_of_any_size(events, piece, block, random):
    "The tables do not depend on how the pulses come in, and hold every event as it was."
    import iceaggr.pulses as reading
    n = np.array([len(e) for e in events])
    flat = np.array(sum(events, []))
    columns = dict(time=flat[:, 0], sensor_id=flat[:, 1], charge=np.arange(1, len(flat) + 1) * np.float32(0.1), auxiliary=flat[:, 0] % 2 == 0)
    order = np.array(random.sample(range(len(n)), len(n)))
    def make(piece, block):
        keep, reading.BLOCK_PULSES = reading.BLOCK_PULSES, block
        try:
            blocks = PulseBlocks(n)
            for i in range(0, len(flat), piece): blocks.add({k: v[i:i + piece] for k, v in columns.items()})
        finally: reading.BLOCK_PULSES = keep
        return blocks.finish(order)
    a, b = make(piece, block), make(10**6, 10**6)
    for x, y in ((a.columns, b.columns), (a.doms, b.doms), (a.events, b.events)): assert all(np.array_equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in y)
    source = np.stack([columns[k].astype(np.float32) for k in ("time", "charge", "sensor_id", "auxiliary")], 1)
    start = np.cumsum(n) - n
    for k in range(len(n)):                                                               # the k-th event that came is event order[k]
        e = source[start[k]:start[k] + n[k]]
        assert np.array_equal(a.gather(np.array([order[k]])), e[np.argsort(e[:, 0], kind="stable")])


def test_thin_events(tmp_path):
    "With all light an event stays as it is; with less its charge falls in proportion while the noise stays, and direction and source are kept; every tenth event is left out."
    data = simulate_dataset(tmp_path / "data", 300, seed=5, events_per_file=150, progress=False, mix="ppc")
    thin = lambda out, *options: call(data, tmp_path / out, "--files", "1,2", *options, script=Path(__file__).parents[1] / "data_scripts/thin_events.py")
    read = lambda folder: (pd.concat([pd.read_parquet(f).groupby("event_id").agg(charge=("charge", "sum"), pulses=("charge", "size"), noise=("auxiliary", "sum"), sensors=("sensor_id", frozenset)) for f in sorted((folder / "train").iterdir())]),
                           pd.read_parquet(folder / "truth.parquet").merge(pd.read_parquet(folder / "train_meta.parquet"), on=["batch_id", "event_id"]).set_index("event_id"))
    assert thin("all", "--copies", 1, "--least", 1, "--most", 1).returncode == 0
    (before, source), (same, truth) = read(data), read(tmp_path / "all")
    of = before.loc[truth.source_event].set_index(same.index)
    assert len(same) == 270 and not (source.index.get_indexer(truth.source_event) % 10 == 9).any()
    assert all(b <= a for a, b in zip(of.sensors, same.sensors)) and abs(same.pulses.sum() / of.pulses.sum() - 1) < 0.03 and abs(same.charge.sum() / of.charge.sum() - 1) < 0.03
    done = thin("half", "--copies", 2, "--least", 0.5, "--most", 0.5)
    assert done.returncode == 0, done.stderr
    half, truth = read(tmp_path / "half")
    of, origin = before.loc[truth.source_event].set_index(half.index), source.loc[truth.source_event]
    assert len(half) < 540 and set(truth.batch_id) == {1, 2} and (truth.light == 0.5).all()
    for column in ("azimuth", "zenith", "type", "vertex_x"): assert np.array_equal(truth[column], origin[column])
    bright = of.charge > 300
    assert bright.sum() > 20 and ((half.charge / of.charge)[bright] - 0.5).abs().median() < 0.06
    lonely = of.charge < 80                                                # most auxiliary pulses are noise, with some light of single DOMs
    assert 0.8 < half.noise[lonely].mean() / of.noise[lonely].mean() < 1.1
    assert all("at least" in thin("none", *bad).stderr for bad in (("--copies", 0), ("--held-out", 1))) and "shares" in thin("none", "--least", 0.9, "--most", 0.5).stderr
    truth = pd.read_parquet(data / "truth.parquet")
    truth.drop(index=3).to_parquet(data / "truth.parquet", index=False)
    assert "truth.parquet: 1 of 150 events of file 1 are missing" in thin("none").stderr
    assert "already" in thin("half").stderr and "no events of a file 7" in call(data, tmp_path / "none", "--files", "7", script=Path(__file__).parents[1] / "data_scripts/thin_events.py").stderr and not (tmp_path / "none").exists()


def test_move_cascades(tmp_path):
    "Each DOM's light is found again on a DOM at its depth, as far away sideways as the cascade was moved, at the same delay after unscattered light; directions stay, tracks and events kept back are left out."
    drilled = Geometry.nominal().xyz + np.random.default_rng(0).uniform([-8, -8, -4], [8, 8, 4], (86, 3)).repeat(60, axis=0)      # off the grid
    data = simulate_dataset(tmp_path / "data", 300, seed=6, events_per_file=150, progress=False, mix="cascades", geometry=Geometry(drilled))
    move = lambda out, *options: call(data, tmp_path / out, "--files", "1,2", *options, script=Path(__file__).parents[1] / "data_scripts/move_cascades.py")
    done = move("moved", "--copies", 2, "--least", 1, "--most", 1)
    assert done.returncode == 0, done.stderr
    xyz, truth, source = load_geometry(data).xyz, pd.read_parquet(tmp_path / "moved/truth.parquet"), pd.read_parquet(data / "truth.parquet").set_index("event_id")
    table = lambda folder: pd.concat([pd.read_parquet(f) for f in sorted((folder / "train").iterdir())])
    before, after, meta = table(data), table(tmp_path / "moved"), pd.read_parquet(tmp_path / "moved/train_meta.parquet").set_index("event_id")
    origin = source.loc[truth.source_event].reset_index()
    assert len(truth) > 80 and (origin.type == "cascade").all() and not (truth.source_event % 10 == 9).any()
    directions = pd.read_parquet(data / "train_meta.parquet").set_index("event_id").loc[truth.source_event]
    for column in ("azimuth", "zenith"): assert np.array_equal(meta[column], directions[column])
    places = ["vertex_x", "vertex_y", "vertex_z"]
    vectors = truth[places].to_numpy() - origin[places].to_numpy()
    assert (vectors[:, 2] == 0).all() and (np.hypot(*vectors.T[:2]) > 120).all() and len(np.unique(vectors.round(3), axis=0)) > 20
    found = checked = 0
    for vector, row, old in zip(vectors, truth.itertuples(), origin.itertuples()):
        was, now = before.loc[row.source_event], after.loc[row.event_id]
        was, now = was[~was.auxiliary], now[~now.auxiliary]
        delay = lambda p, vertex: p.time.to_numpy() - 1.36 / 0.299792458 * np.linalg.norm(xyz[p.sensor_id] - vertex, axis=1)
        a, b = was.assign(delay=delay(was, [old.vertex_x, old.vertex_y, old.vertex_z])), now.assign(delay=delay(now, [row.vertex_x, row.vertex_y, row.vertex_z]))
        a, b = (p.groupby("sensor_id").agg(charge=("charge", "sum"), delay=("delay", "min"), n=("delay", "size")) for p in (a, b))
        a = a[a.index < 78 * 60].nlargest(4, "charge")
        offset = xyz[a.index, None] + vector - xyz[None, b.index]
        near = (np.linalg.norm(offset[..., :2], axis=2) < 22) & (np.abs(offset[..., 2]) < 12)
        same = [(x, b.iloc[n.argmax()]) for (_, x), n in zip(a.iterrows(), near) if n.sum() == 1]
        found += sum(abs(y.charge / x.charge - 1) < 0.05 for x, y in same); checked += len(same)
        shifts = np.array([y.delay - x.delay for x, y in same if x.n == y.n])
        if len(shifts) > 1: assert np.median(np.abs(shifts - np.median(shifts))) < 3, shifts                        # times are whole nanoseconds, and the trigger's moves all alike
    assert checked > 200 and found > 0.8 * checked, (found, checked)
    tracks = simulate_dataset(tmp_path / "few", 20, seed=1, events_per_file=20, progress=False)
    truth = pd.read_parquet(tracks / "truth.parquet")
    truth.assign(type="track_through").to_parquet(tracks / "truth.parquet")
    refused = call(tracks, tmp_path / "none", "--files", "1", script=Path(__file__).parents[1] / "data_scripts/move_cascades.py")
    assert refused.returncode and "no cascade" in refused.stderr and not (tmp_path / "none").exists()


def test_join_datasets(tmp_path):
    "Events of several data sets keep their pulses and truth; ids are new, and refused are an existing folder and another detector."
    parts = [simulate_dataset(tmp_path / name, 60, seed=seed, events_per_file=30, progress=False) for name, seed in (("a", 1), ("b", 2))]
    join = lambda out, *files: call(tmp_path / out, *files, script=Path(__file__).parents[1] / "data_scripts/join_datasets.py")
    done = join("both", f"{parts[0]}:2:20", f"{parts[1]}:1", f"{parts[1]}:2")
    assert done.returncode == 0, done.stderr
    both, wanted = IceCubeDataset(tmp_path / "both"), [(IceCubeDataset(parts[k], batch_ids=[f]), i) for k, f, n in ((0, 2, 20), (1, 1, 30), (1, 2, 30)) for i in range(n)]
    assert len(both) == 80 and [int(both[i]["event_id"]) for i in range(80)] == list(range(80))
    for i, (ds, j) in enumerate(wanted):
        for key in ("pulse_features", "target"): assert torch.equal(both[i][key], ds[j][key])
    truth = pd.read_parquet(tmp_path / "both/truth.parquet")
    assert np.array_equal(truth.energy[20:], pd.read_parquet(parts[1] / "truth.parquet").energy) and truth.batch_id.tolist() == [101] * 20 + [102] * 30 + [103] * 30
    assert "already" in join("both", f"{parts[0]}:1").stderr and "no events of a file 7" in join("none", f"{parts[0]}:7").stderr and not (tmp_path / "none").exists()
    (parts[1] / "sensor_geometry.csv").write_text(re.sub(r"(?m)^(\d+),(-?[\d.]+)", lambda m: f"{m[1]},{float(m[2]) + 5}", (parts[1] / "sensor_geometry.csv").read_text()))
    assert "another detector" in join("other", f"{parts[0]}:1", f"{parts[1]}:1").stderr and not (tmp_path / "other").exists()
