"""Files of all formats: told apart by content, with the same predictions, and refused where they mislead."""
import sqlite3
from contextlib import closing

import numpy as np
import pandas as pd
import pytest

from iceaggr.cli import main
from iceaggr.common import DataError
from iceaggr.data import IceCubeDataset
from iceaggr.geometry import ORIGIN_DEPTH, Geometry
from iceaggr.io.convert import convert, file_format, read_events
from iceaggr.io.writing import write_dataset
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.simulation.dataset import simulate_events

OSCNEXT = "oscNext_genie_level7_v02_first_5_frames"


@pytest.fixture(scope="module")
def simulated(): return simulate_events(12, seed=3)


@pytest.fixture(scope="module")
def expected(simulated, tmp_path_factory):
    "The events as a data set."
    pulses, truth = simulated
    return IceCubeDataset(write_dataset(pulses, tmp_path_factory.mktemp("own") / "events", truth))


def same_events(ds, expected):
    assert len(ds) == len(expected)
    for a, b in zip(ds, expected, strict=True):
        assert a["pulse_features"].equal(b["pulse_features"]) and a["event_id"] == b["event_id"]
        assert a["target"].allclose(b["target"])


# Real files

def test_three_formats_give_the_same_prediction(graphnet_root, tmp_path):
    "The five oscNext events from i3, SQLite and Parquet, straight and as data sets, to 0.001 degrees."
    model = HierarchicalTransformer.from_pretrained("base")
    found, truths = [], []
    for k, name in enumerate((f"i3/{OSCNEXT}.i3.gz", f"{OSCNEXT}.db", "merged")):
        path = graphnet_root / name
        pieces = list(read_events(path, pulsemap="SRTInIcePulses"))
        found.append(pd.concat([model.predict(pulses) for _, pulses, _ in pieces]))
        truth = pd.concat([known for *_, known in pieces]).sort_values("event_id")
        truths.append(truth[["azimuth", "zenith", "energy"]].to_numpy(float))
        ds = IceCubeDataset(convert(path, tmp_path / str(k), pulsemap="SRTInIcePulses"))
        found.append(predict_dataset(model, ds))
    assert np.allclose(truths[0], truths[1]) and np.allclose(truths[0], truths[2])
    first = found[0].set_index("event_id").sort_index()
    for table in found[1:]:
        table = table.set_index("event_id").sort_index()
        for column in ("azimuth", "zenith"):
            assert np.abs(np.rad2deg(table[column] - first[column])).max() < 1e-3
    assert {"run_id", "event", "sub_event"} <= set(first)


def test_other_detectors_of_prometheus_are_refused(graphnet_root):
    for name in ("22980001_photons.parquet", "prometheus-events.db"):
        with pytest.raises(DataError, match="its detector is not IceCube"):
            list(read_events(graphnet_root / name))


# Made files

def test_tables_of_pulses(simulated, expected, tmp_path):
    "CSV and Parquet, the truth in the same rows or in a file of its own; the name does not matter."
    pulses, truth = simulated
    both = pulses.merge(truth[["event_id", "azimuth", "zenith"]])
    both.to_csv(tmp_path / "both.txt", index=False)
    both.set_index("event_id").to_parquet(tmp_path / "both.db")
    pulses.to_parquet(tmp_path / "pulses")
    truth.to_csv(tmp_path / "truth", index=False)
    for k, (name, options) in enumerate([("both.txt", {}), ("both.db", {}),
                                         ("pulses", dict(truth=tmp_path / "truth"))]):
        assert file_format(tmp_path / name) == "table"
        same_events(IceCubeDataset(convert(tmp_path / name, tmp_path / f"out{k}", **options)), expected)
    with pytest.raises(DataError, match="goes with a table of pulses"):
        pd.DataFrame(dict(photons=[], mc_truth=[])).to_parquet(tmp_path / "photons")
        convert(tmp_path / "photons", tmp_path / "x", truth=tmp_path / "truth")
    out = convert(tmp_path / "both.txt", tmp_path / "recorded", truth=False)
    assert len(IceCubeDataset(out, split="test")) == 12


def test_prometheus_in_the_geometry_of_icecube(simulated, expected, tmp_path):
    "Heights from the surface, true directions of flight."
    pulses, truth = simulated
    place = Geometry.icecube86().xyz[pulses.sensor_id] - [0, 0, ORIGIN_DEPTH]
    hits = pd.DataFrame(place, columns=["sensor_pos_x", "sensor_pos_y", "sensor_pos_z"])
    hits = hits.assign(t=pulses.time.to_numpy(float), event_id=pulses.event_id)
    photons = [{c: g[c].tolist() for c in g if c != "event_id"} for _, g in hits.groupby("event_id")]
    known = [dict(initial_state_azimuth=a - np.pi, initial_state_zenith=np.pi - z)
             for a, z in zip(truth.azimuth, truth.zenith, strict=True)]
    pd.DataFrame(dict(mc_truth=known, photons=photons)).to_parquet(tmp_path / "photons.parquet")
    ds = IceCubeDataset(convert(tmp_path / "photons.parquet", tmp_path / "out"))
    for a, b in zip(ds, expected, strict=True):
        times, sensors = ([np.sort(e["pulse_features"][:, c]) for e in (a, b)] for c in (0, 2))
        assert np.array_equal(*times) and np.array_equal(*sensors)
        assert a["target"].allclose(b["target"]) and (a["pulse_features"][:, 1] == 1).all()


def test_several_files_and_a_folder_of_databases(simulated, tmp_path):
    "Numbered alike, they are kept apart; additions get new batch numbers."
    pulses, truth = simulated
    table = pd.DataFrame(Geometry.icecube86().xyz[pulses.sensor_id], columns=["dom_x", "dom_y", "dom_z"])
    table = table.assign(event_no=pulses.event_id, dom_time=pulses.time, charge=pulses.charge)
    (tmp_path / "jobs").mkdir()
    for k in range(3):
        with closing(sqlite3.connect(tmp_path / f"jobs/part_{k}.db")) as db:
            table.to_sql("InIcePulses", db, index=False)
            truth.rename(columns=dict(event_id="event_no")).to_sql("truth", db, index=False)
    out = convert(tmp_path / "jobs", tmp_path / "out")
    convert([tmp_path / "jobs/part_0.db", tmp_path / "jobs/part_2.db"], out)
    table = IceCubeDataset(out).event_table()
    assert table.event_id.tolist() == list(range(60)) and table.batch_id.unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content, message", [
    (b"a,b\n1,2\n", "it has a, b"), (b"", "no columns"), (b"\xff\xfe\x00", "no columns")])
def test_unknown_formats_are_refused(tmp_path, content, message):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=message): convert(tmp_path / "x.csv", tmp_path / "out")
    with pytest.raises(DataError, match="no such file"): convert(tmp_path / "y.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The folder

def test_runs_of_one_table_are_kept_apart(simulated, tmp_path):
    "The key is in sources.parquet, and the truth is matched by all of it."
    pulses, truth = simulated
    runs = [pd.concat([t.assign(run_id=r) for r in (5, 6)]) for t in (pulses, truth)]
    runs[1].loc[runs[1].run_id == 6, "zenith"] = 0.5
    ds = IceCubeDataset(write_dataset(runs[0], tmp_path / "out", runs[1]))
    sources = pd.read_parquet(tmp_path / "out/sources.parquet")
    assert sources.run_id.tolist() == [5] * 12 + [6] * 12 and sources.number.tolist() == 2 * list(range(12))
    assert ds.event_table().zenith[12:].eq(np.float32(0.5)).all()
    with pytest.raises(DataError, match="duplicated in the truth"):
        write_dataset(pulses, tmp_path / "x", pd.concat([truth, truth]))
    with pytest.raises(DataError, match="truth has no column run_id, which tells events"):
        write_dataset(runs[0], tmp_path / "x", truth)


def test_ids_of_the_truth_are_exact(simulated, tmp_path):
    "Text is the number that it names; a float beyond 2^53 is refused."
    pulses, truth = simulated
    as_text = truth.assign(event_id="0" + truth.event_id.astype(str))
    assert len(IceCubeDataset(write_dataset(pulses, tmp_path / "out", as_text))) == 12
    with pytest.raises(DataError, match="truth: .* read the ids as int64"):
        write_dataset(pulses, tmp_path / "x", truth.assign(event_id=truth.event_id + 2.0 ** 53))


@pytest.mark.parametrize("largest", [40, 2 ** 63 - 1])
def test_splits_of_a_data_set_share_their_numbers(simulated, tmp_path, largest):
    "The second call is numbered on, from below where there is no room above."
    pulses, truth = simulated
    pulses = pulses.assign(event_id=pulses.event_id.replace(0, largest))
    truth = truth.assign(event_id=truth.event_id.replace(0, largest))
    out = write_dataset(pulses, tmp_path / "out", truth)
    write_dataset(pulses, out)
    ids = [IceCubeDataset(out, split).event_ids.tolist() for split in ("train", "test")]
    assert len({*ids[0], *ids[1]}) == 24 and largest in ids[0]
    assert pd.read_parquet(out / "sources.parquet").event_id.is_unique


def test_a_failed_addition_leaves_the_data_set(simulated, expected, tmp_path):
    "So does a failed first call, which leaves nothing."
    pulses, truth = simulated
    out = write_dataset(pulses, tmp_path / "out", truth)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    pieces = [("good", pulses, truth), ("bad", pulses.assign(charge=-1.0), truth)]
    with pytest.raises(DataError, match="bad: column charge, event 0"): write_dataset(pieces, out)
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(DataError, match="bad"): write_dataset(pieces, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_folders_are_left_alone(simulated, tmp_path):
    pulses, truth = simulated
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("a")
    with pytest.raises(DataError, match="no data set"): write_dataset(pulses, tmp_path / "notes", truth)
    assert (tmp_path / "notes/a.txt").exists()
    out = write_dataset(pulses, tmp_path / "out", truth)
    with pytest.raises(DataError, match="another detector"):
        write_dataset(pulses, out, truth, Geometry.nominal())
    with pytest.raises(DataError, match="some files have truth"):
        write_dataset([("a", pulses, truth), ("b", pulses, None)], tmp_path / "mixed")
    assert len(IceCubeDataset(out)) == 12


# Small events

@pytest.mark.filterwarnings("error")
def test_small_events_are_warned_of_once(graphnet_root, simulated):
    "Of the oscNext events, not of simulated neutrinos of 200 GeV and more."
    model = HierarchicalTransformer.from_pretrained("small")
    model.predict(simulated[0])
    (_, pulses, _), = read_events(graphnet_root / f"{OSCNEXT}.db")
    with pytest.warns(UserWarning, match="5 of 5 events have fewer than 8 DOMs") as caught:
        model.predict(pulses)
    assert len(caught) == 1 and caught[0].filename == __file__


# The command

def command(capsys, *argv):
    "Run the command; what it printed."
    assert main([str(a) for a in argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_an_i3_file_to_predictions_in_one_command(graphnet_root, tmp_path, capsys):
    "Run, event and sub-event are in the table."
    path = graphnet_root / f"i3/{OSCNEXT}.i3.gz"
    assert "5 predictions" in command(capsys, "predict", "--data", path, "--run", "small",
                                      "--out", tmp_path / "p.csv")
    table = pd.read_csv(tmp_path / "p.csv")
    assert table.columns.tolist()[:4] == ["event_id", "run_id", "event", "sub_event"]
    assert table.run_id.unique().tolist() == [140_000] and table.event.tolist() == [2, 30, 32, 56, 62]
    for option in (("--batches", "1"), ("--submission",), ("--on-bad-event", "skip")):
        words = ["predict", "--data", str(path), "--run", "small", "--out", str(tmp_path / "q.csv")]
        assert main([*words, *option]) == 2
        assert "convert" in capsys.readouterr().err


def test_a_frame_to_report_and_display_in_three_commands(simulated, tmp_path, capsys):
    pulses, truth = simulated
    pulses.merge(truth[["event_id", "azimuth", "zenith"]]).to_parquet(tmp_path / "frame.parquet")
    events, report = tmp_path / "events", tmp_path / "report"
    assert "12 events" in command(capsys, "convert", tmp_path / "frame.parquet", "--out", events)
    assert "report.html" in command(capsys, "evaluate", "--run", "small", "--data", events, "--out", report)
    assert len(pd.read_parquet(report / "predictions.parquet")) == 12
    command(capsys, "display", "--run", "small", "--data", events, "--event", "brightest",
            "--out", report / "event.html")
    assert (report / "event.html").stat().st_size > 1_000


def test_recorded_events_need_no_split(simulated, tmp_path, capsys):
    "A folder with test/ alone is recognised."
    pulses, _ = simulated
    pulses.to_csv(tmp_path / "pulses.csv", index=False)
    said = command(capsys, "convert", tmp_path / "pulses.csv", "--out", tmp_path / "out")
    assert "without directions" in said
    assert "12 predictions" in command(capsys, "predict", "--run", "small", "--data", tmp_path / "out",
                                       "--out", tmp_path / "p.csv")
