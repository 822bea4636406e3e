"""GraphNeT's files: converted there and back, and what is refused."""
import sqlite3
from contextlib import closing

import numpy as np
import pandas as pd
import pytest

from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.geometry import Geometry
from iceaggr.io.graphnet import convert_graphnet, graphnet_pulses
from iceaggr.simulation.dataset import simulate_events

DETECTOR = Geometry.nominal()
POSITION = ["dom_x", "dom_y", "dom_z"]
MAP = "SplitInIcePulses"


@pytest.fixture(scope="module")
def simulated(): return simulate_events(60, seed=3)


@pytest.fixture(scope="module")
def tables(simulated):
    "The simulated events as GraphNeT holds them."
    pulses, truth = simulated
    there = pd.DataFrame(dict(
        charge=pulses.charge, dom_time=pulses.time - 0.3, hlc=(~pulses.auxiliary).astype(int),
        event_no=pulses.event_id))
    there[POSITION] = DETECTOR.xyz[pulses.sensor_id]
    known = truth.rename(columns=dict(event_id="event_no"))[["event_no", "energy", "azimuth", "zenith"]]
    return there, known


def write_sqlite(path, pulses, truth):
    "A database with both tables."
    with closing(sqlite3.connect(path)) as db:
        pulses.to_sql(MAP, db, index=False)
        truth.to_sql("truth", db, index=False)
    return path


def write_parquet(folder, pulses, truth, number=0, index=False):
    "One Parquet file of each table."
    for name, table in ((MAP, pulses), ("truth", truth)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if index: table = table.set_index("event_no")
        table.to_parquet(folder / name / f"{name}_{number}.parquet", index=index)
    return folder


@pytest.fixture
def tiny():
    "Three pulses of two events."
    table = pd.DataFrame(dict(event_no=[7, 7, 3], dom_time=[20.0, 10.0, 5.0], charge=1.0, hlc=[1, 0, 1]))
    table[POSITION] = DETECTOR.xyz[[100, 5_000, 42]]
    return table


def test_pulses_get_sensor_ids_and_flags(tiny):
    "Pulses are sorted by event and time; without `hlc` none is auxiliary."
    pulses = graphnet_pulses(tiny, DETECTOR)
    assert pulses.sensor_id.tolist() == [42, 5_000, 100]
    assert pulses.auxiliary.tolist() == [False, True, False]
    assert not graphnet_pulses(tiny.drop(columns="hlc"), DETECTOR).auxiliary.any()


@pytest.mark.parametrize("change, message", [
    (dict(charge=[1, 0, 1]), "event 7"),
    (dict(dom_x=5_000.0), "metres"),
    (dict(dom_time=-3.0), "event 7: -3.0 is not a time"),
    (dict(dom_time=np.nan), "event 7: nan"),
    (dict(event_no=[7, np.nan, 3]), "1 pulses without an event"),
])
def test_bad_pulses_are_refused(tiny, change, message):
    "The message names what is wrong."
    with pytest.raises(DataError, match=message): graphnet_pulses(tiny.assign(**change), DETECTOR)


def test_a_missing_column_is_named(tiny):
    "The message names the column."
    with pytest.raises(DataError, match="dom_y missing"):
        graphnet_pulses(tiny.drop(columns="dom_y"), DETECTOR)


@pytest.mark.parametrize("form", ["sqlite", "parquet"])
def test_there_and_back(simulated, tables, tmp_path, form):
    "Both forms, converted, have the pulses and directions that they had."
    there, known = tables
    if form == "sqlite": source = write_sqlite(tmp_path / "events.db", there, known)
    else:
        source = tmp_path / "merged"
        for k, ids in enumerate(np.array_split(known.event_no.to_numpy(), 3)):
            write_parquet(source, there[there.event_no.isin(ids)], known[known.event_no.isin(ids)], k)
    ds = IceCubeDataset(convert_graphnet(source, tmp_path / "out", DETECTOR, events_per_file=25))
    assert len(ds) == 60 and ds.event_table().batch_id.nunique() == 3
    pulses, truth = simulated
    for event in ds:
        number = int(event["event_id"])
        columns = ["time", "charge", "sensor_id", "auxiliary"]
        expected = pulses.loc[pulses.event_id == number, columns].to_numpy(np.float32)
        row = truth[truth.event_id == number].iloc[0]
        assert np.array_equal(np.sort(event["pulse_features"].numpy(), axis=0), np.sort(expected, axis=0))
        assert np.allclose(event["target"], [row.azimuth, row.zenith])


def test_recorded_data_become_the_test_split(tables, tmp_path):
    "Without a truth table there are no targets."
    source = write_sqlite(tmp_path / "events.db", *tables)
    out = convert_graphnet(source, tmp_path / "out", DETECTOR, truth_table=None)
    recorded = IceCubeDataset(out, split="test")
    assert len(recorded) == 60 and "target" not in recorded[0]


def test_index_missing_pulses_and_negative_azimuth(tables, tmp_path):
    "event_no as index, an event without pulses, azimuth from -pi, a column that has the name of one of ours."
    there, known = tables
    truth = known.assign(azimuth=known.azimuth - 2 * np.pi, batch_id=5)
    source = write_parquet(tmp_path / "odd", there[there.event_no != 7], truth, index=True)
    out = convert_graphnet(source, tmp_path / "out", DETECTOR)
    table = IceCubeDataset(out).event_table()
    assert len(table) == 59 and 7 not in table.event_id.to_numpy()
    assert np.allclose(table.azimuth, known.azimuth[known.event_no != 7], atol=1e-6)
    assert set(pd.read_parquet(out / "truth.parquet")) == {"batch_id", "event_id", "energy"}


@pytest.mark.parametrize("source, out, pulsemap, message", [
    ("none.db", "x", MAP, "no such file"),
    ("notes.txt", "x", MAP, "not a SQLite"),
    ("events.db", "full", MAP, "not empty"),
    ("events.db", "x", "InIceDSTPulses", "it has SplitInIcePulses"),
    ("merged", "x", "InIceDSTPulses", "no Parquet files"),
])
def test_wrong_sources_are_refused_and_leave_nothing(tables, tmp_path, source, out, pulsemap, message):
    "After the error the name of the folder is free."
    write_sqlite(tmp_path / "events.db", *tables)
    write_parquet(tmp_path / "merged", *tables)
    (tmp_path / "notes.txt").write_text("no database")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(DataError, match=message):
        convert_graphnet(tmp_path / source, tmp_path / out, DETECTOR, pulsemap)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "x"))]


@pytest.mark.parametrize("table, column, value, message", [
    ("pulses", "charge", np.nan, "without a charge"),
    ("pulses", "charge", np.inf, "without a charge"),
    ("truth", "zenith", np.nan, "no direction of event 0"),
])
def test_values_that_are_missing(tables, tmp_path, table, column, value, message):
    "The first value of a column is spoilt."
    changed = dict(zip(("pulses", "truth"), tables, strict=True))
    old = changed[table]
    changed[table] = old.assign(**{column: old[column].where(old.index > 0, value)})
    source = write_parquet(tmp_path / "bad", changed["pulses"], changed["truth"])
    with pytest.raises(DataError, match=message): convert_graphnet(source, tmp_path / "x", DETECTOR)


def test_a_piece_without_pulses_is_passed_over(tables, tmp_path):
    "The events of the first file have no pulses."
    there, known = tables
    write_parquet(tmp_path / "bare", there[:0], known[known.event_no < 20], 3)
    write_parquet(tmp_path / "bare", there[there.event_no >= 20], known[known.event_no >= 20], 4)
    assert len(IceCubeDataset(convert_graphnet(tmp_path / "bare", tmp_path / "out", DETECTOR))) == 40


@pytest.mark.parametrize("lost", [59, 0, 25])
def test_pulses_without_truth(tables, tmp_path, lost):
    "The event that the truth lacks is named, at the ends of the pieces too."
    there, known = tables
    source = write_sqlite(tmp_path / "less.db", there, known[known.event_no != lost])
    with pytest.raises(DataError, match=f"no direction of event {lost}"):
        convert_graphnet(source, tmp_path / "x", DETECTOR, events_per_file=25)


def test_pulses_without_a_number(tables, tmp_path):
    "A missing event_no in SQLite is an error."
    there, known = tables
    without = there.assign(event_no=there.event_no.where(there.event_no > 0))
    source = write_sqlite(tmp_path / "less.db", without, known)
    with pytest.raises(DataError, match="event_no"): convert_graphnet(source, tmp_path / "x", DETECTOR)


@pytest.mark.parametrize("names", [
    ("numu", "nue"), ("numu_0", "nue_0"), ("numu_0", "nue"), ("numu_0", "numu_00"),
])
def test_each_file_needs_a_number_of_its_own(tables, tmp_path, names):
    "Both files are named, and how to name them."
    for name, table in zip((MAP, "truth"), tables, strict=True):
        (tmp_path / "twice" / name).mkdir(parents=True)
        for which, file in enumerate(names):
            path = tmp_path / "twice" / name / f"{file}.parquet"
            table[table.event_no % 2 == which].to_parquet(path, index=False)
    with pytest.raises(DataError, match=f"{MAP}_1.parquet") as error:
        convert_graphnet(tmp_path / "twice", tmp_path / "x", DETECTOR)
    assert all(f"{name}.parquet" in str(error.value) for name in names)
