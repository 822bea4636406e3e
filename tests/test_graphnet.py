"""GraphNeT's files: both forms give the events that were written, and faults are named."""
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
PULSEMAP = "SplitInIcePulses"
COLUMNS = ["time", "charge", "sensor_id", "auxiliary"]


def write_sqlite(path, pulses, truth):
    with closing(sqlite3.connect(path)) as db:
        pulses.to_sql(PULSEMAP, db, index=False)
        truth.to_sql("truth", db, index=False)
    return path


def write_parquet(folder, pulses, truth, suffix="_0", index=None):
    "Add a file of pulses and one of truth to a folder; the index, if any, is written too."
    for name, table in ((PULSEMAP, pulses), ("truth", truth)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        table = table.set_index(index) if index else table
        table.to_parquet(folder / name / f"{name}{suffix}.parquet", index=bool(index))
    return folder


@pytest.fixture(scope="module")
def simulated(): return simulate_events(60, seed=3)


@pytest.fixture(scope="module")
def tables(simulated):
    "Pulses and truth as GraphNeT holds them."
    pulses, truth = simulated
    table = pd.DataFrame(DETECTOR.xyz[pulses.sensor_id], columns=["dom_x", "dom_y", "dom_z"])
    table = table.assign(event_no=pulses.event_id, dom_time=pulses.time - 0.3, charge=pulses.charge)
    table["hlc"] = (~pulses.auxiliary).astype(int)
    return table, truth.rename(columns={"event_id": "event_no"})[["event_no", "energy", "azimuth", "zenith"]]


@pytest.fixture(scope="module")
def database(tables, tmp_path_factory):
    return write_sqlite(tmp_path_factory.mktemp("db") / "events.db", *tables)


@pytest.fixture(scope="module")
def merged(tables, tmp_path_factory):
    "Three Parquet files."
    folder, (pulses, truth) = tmp_path_factory.mktemp("merged"), tables
    for k, part in enumerate(np.array_split(truth.event_no.to_numpy(), 3)):
        write_parquet(folder, pulses[pulses.event_no.isin(part)], truth[truth.event_no.isin(part)], f"_{k}")
    return folder


@pytest.fixture
def tiny():
    "Three pulses of two events."
    columns = {"event_no": [7, 7, 3], "dom_time": [20.0, 10.0, 5.0], "charge": 1.0, "hlc": [1, 0, 1]}
    table = pd.DataFrame(columns)
    table[["dom_x", "dom_y", "dom_z"]] = DETECTOR.xyz[[100, 5_000, 42]]
    return table


def test_pulses_get_sensors_and_flags(tiny):
    pulses = graphnet_pulses(tiny, DETECTOR)
    assert pulses.sensor_id.tolist() == [42, 5_000, 100]
    assert pulses.auxiliary.tolist() == [False, True, False]
    assert not graphnet_pulses(tiny.drop(columns="hlc"), DETECTOR).auxiliary.any()


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.drop(columns="dom_y"), "dom_y missing"),
    (lambda t: t.assign(dom_x=5_000.0), "metres"),
    (lambda t: t.assign(event_no=[7, np.nan, 3]), "event_no: missing in some rows"),
    (lambda t: t.assign(event_no=[7, 2.0 ** 60, 3]), "event_no: .* read the ids as int64"),
    (lambda t: t.assign(hlc=[1, -1, 0]), "hlc, event 7: -1 is neither 0 nor 1"),
    (lambda t: t.assign(hlc=[1, None, 0]), "hlc, event 7: nan is neither"),
    (lambda t: t.assign(hlc="yes"), "hlc, event 7: yes is neither"),
    (lambda t: t.assign(dom_x=5_000.0, string=[1, 87, 2]), "only_known_doms"),
])
def test_faults_of_pulses_are_named(tiny, change, message):
    with pytest.raises(DataError, match=message): graphnet_pulses(change(tiny), DETECTOR)


@pytest.mark.parametrize("form", ["database", "merged"])
def test_both_forms_give_the_events(simulated, tmp_path, form, request):
    pulses, truth = simulated
    source = request.getfixturevalue(form)
    ds = IceCubeDataset(convert_graphnet(source, tmp_path / "out", DETECTOR, events_per_file=25))
    assert len(ds) == 60 and ds.event_table().batch_id.nunique() == 3
    truth = truth.set_index("event_id")
    for event in ds:
        event_id = int(event["event_id"])
        own = pulses.loc[pulses.event_id == event_id, COLUMNS].to_numpy(np.float32)
        assert np.array_equal(np.sort(event["pulse_features"], axis=0), np.sort(own, axis=0))
        assert np.allclose(event["target"], truth.loc[event_id, ["azimuth", "zenith"]].to_numpy(float))


def test_recorded_data_become_the_test_split(database, tmp_path):
    out = convert_graphnet(database, tmp_path / "out", DETECTOR, truth_table=None)
    recorded = IceCubeDataset(out, split="test")
    assert len(recorded) == 60 and "target" not in recorded[0]


def test_event_no_as_index(tables, tmp_path):
    "An event without pulses is left out. So is a column of the truth that the meta table has, too."
    pulses, truth = tables
    odd = truth.assign(batch_id=5)
    folder = write_parquet(tmp_path / "in", pulses[pulses.event_no != 7], odd, index="event_no")
    ds = IceCubeDataset(convert_graphnet(folder, tmp_path / "out", DETECTOR))
    table = ds.event_table()
    assert len(ds) == 59 and 7 not in table.event_id.to_numpy()
    assert np.allclose(table.azimuth, truth.azimuth[truth.event_no != 7], atol=1e-6)
    assert set(pd.read_parquet(tmp_path / "out/truth.parquet")) == {"batch_id", "event_id", "energy"}


def refused(tmp_path, source, message, **options):
    "Assert that a conversion fails with a message and leaves nothing behind."
    with pytest.raises(DataError, match=message):
        convert_graphnet(source, tmp_path / "x", DETECTOR, **options)
    assert not (tmp_path / "x").exists() and not (tmp_path / ".x.part").exists()


def test_missing_files_and_tables_are_named(database, merged, tmp_path):
    (tmp_path / "notes.txt").write_text("no database")
    refused(tmp_path, tmp_path / "none.db", "no such file")
    refused(tmp_path, tmp_path / "notes.txt", "not a SQLite")
    refused(tmp_path, database, "it has SplitInIcePulses", pulsemap="InIceDSTPulses")
    refused(tmp_path, database, "name of one table", pulsemap=[PULSEMAP, "other"])
    refused(tmp_path, database, "at least 1; got 0", events_per_file=0)
    refused(tmp_path, merged, "no Parquet files", pulsemap="InIceDSTPulses")
    with pytest.raises(DataError, match="not empty"): convert_graphnet(database, tmp_path, DETECTOR)


@pytest.mark.parametrize(("table", "column", "value", "message"), [
    (0, "charge", np.nan, "charge, event 0: 'nan' is not a finite number"),
    (0, "charge", np.inf, "charge, event 0: 'inf' is not a finite number"),
    (0, "charge", -1.0, "charge, event 0: '-1.0' is not positive"),
    (1, "zenith", 121.0, "zenith, event 0: 121 is not in 0 to 3.1416 rad; degrees"),
    (1, "zenith", -1.0, "zenith, event 0: -1 is not .*truth_table=None"),
    (1, "azimuth", -0.1, "azimuth, event 0: -0.1 is not in 0 to 6.2832"),
    (1, "zenith", np.nan, "no direction of event 0"),
])
def test_values_that_cannot_be_used(tables, tmp_path, table, column, value, message):
    changed = list(tables)
    values = changed[table][column]
    changed[table] = changed[table].assign(**{column: values.where(values.index > 0, value)})
    refused(tmp_path, write_parquet(tmp_path / "bad", *changed), message)


def test_a_piece_without_pulses_is_passed_over(tables, tmp_path):
    pulses, truth = tables
    write_parquet(tmp_path / "in", pulses[:0], truth[truth.event_no < 20], "_3")
    write_parquet(tmp_path / "in", pulses[pulses.event_no >= 20], truth[truth.event_no >= 20], "_4")
    assert len(IceCubeDataset(convert_graphnet(tmp_path / "in", tmp_path / "out", DETECTOR))) == 40


@pytest.mark.parametrize("event", [0, 25, 59])
def test_pulses_without_truth_are_found(tables, tmp_path, event):
    "At either end of the table and between two pieces."
    pulses, truth = tables
    path = write_sqlite(tmp_path / "less.db", pulses, truth[truth.event_no != event])
    refused(tmp_path, path, f"no direction of event {event}", events_per_file=25)


def test_numbers_as_text_are_refused(tables, tmp_path):
    pulses, truth = (table.astype({"event_no": str}) for table in tables)
    refused(tmp_path, write_sqlite(tmp_path / "text.db", pulses, truth), "event_no holds text; .*CAST")


def test_bad_events_are_left_out(tables, tmp_path):
    "One pulse without charge, one event without direction; late events are counted from their first pulse."
    pulses, truth = tables
    late = np.where(pulses.event_no == 5, 2.0 ** 30, 0)
    pulses = pulses.assign(dom_time=pulses.dom_time + late, charge=pulses.charge.where(pulses.index > 0, 0))
    truth = truth.assign(zenith=truth.zenith.where(truth.event_no != 9))
    path = write_sqlite(tmp_path / "some.db", pulses, truth)
    out = convert_graphnet(path, tmp_path / "out", DETECTOR, on_bad_event="skip", events_per_file=25)
    ds = IceCubeDataset(out)
    assert len(ds) == 58 and set(range(60)) - set(ds.event_table().event_id) == {0, 9}
    assert ds[ds.event_table().event_id.tolist().index(5)]["pulse_features"][0, 0] == 0
    skipped = pd.read_csv(out / "skipped.csv")
    assert skipped.event_id.tolist() == [0, 9] and skipped.column.tolist() == ["charge", "azimuth"]


def test_files_that_number_their_events_alike_are_kept_apart(tables, tmp_path):
    "The second file is numbered on; where an event comes from is known."
    pulses, truth = tables
    for k in (0, 1): write_sqlite(tmp_path / f"part_{k}.db", pulses, truth)
    for k in (0, 1): out = convert_graphnet(tmp_path / f"part_{k}.db", tmp_path / "out", DETECTOR)
    ds, sources = IceCubeDataset(out), pd.read_parquet(out / "sources.parquet")
    assert len(ds) == 120 and sources.event_id.tolist() == list(range(120))
    assert sources.number.tolist() == 2 * list(range(60)) and sources.batch_id.tolist() == [1] * 60 + [2] * 60
    assert ds[7]["pulse_features"].equal(ds[67]["pulse_features"])
    assert ds[7]["target"].equal(ds[67]["target"])


def test_upgrade_without_its_modules(graphnet_root, tmp_path):
    "498 of 625 pulses are on strings above 86."
    path = graphnet_root / "upgrade_genie_step4_140028_000998_first_5_frames.db"
    with pytest.raises(DataError, match="only_known_doms"): convert_graphnet(path, tmp_path / "x")
    with pytest.warns(UserWarning, match="498 of 625 pulses"):
        out = convert_graphnet(path, tmp_path / "out", only_known_doms=True)
    assert sum(int(event["n_pulses"]) for event in IceCubeDataset(out)) == 127


def test_pulses_without_a_number_are_refused(tables, tmp_path):
    pulses, truth = tables
    pulses = pulses.assign(event_no=pulses.event_no.where(pulses.event_no > 0))
    refused(tmp_path, write_sqlite(tmp_path / "less.db", pulses, truth), "event_no")


@pytest.mark.parametrize("names", [
    ("numu", "nue"), ("numu_0", "nue_0"), ("numu_0", "nue"), ("numu_0", "numu_00"),
])
def test_each_parquet_file_needs_a_number_of_its_own(tables, tmp_path, names):
    folder = tmp_path / "in"
    for name, table in zip((PULSEMAP, "truth"), tables, strict=True):
        (folder / name).mkdir(parents=True)
        for k, file in enumerate(names):
            part = table[table.event_no % 2 == k]
            part.to_parquet(folder / name / f"{file}.parquet", index=False)
    refused(tmp_path, folder, f"({names[0]}|{names[1]}).parquet.*SplitInIcePulses_1.parquet")
    with pytest.raises(DataError) as error: convert_graphnet(folder, tmp_path / "x", DETECTOR)
    assert all(f"{name}.parquet" in str(error.value) for name in names)


def test_real_files_need_no_geometry(graphnet_root, tmp_path):
    "Positions of GraphNeT's own SQLite file are those of the default detector."
    out = convert_graphnet(graphnet_root / "oscNext_genie_level7_v02_first_5_frames.db", tmp_path / "out",
                           pulsemap="SRTInIcePulses")
    assert len(IceCubeDataset(out)) == 5
