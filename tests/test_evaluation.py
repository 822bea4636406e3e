"Evaluation: hand-made cases, what can be wrong with a file of predictions, and the report."
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from iceaggr.evaluation import (
    _bootstrap, check_predictions, evaluate, evaluate_dataset, event_errors, find_events,
    read_predictions, write_report)
from iceaggr.line_fit import line_fit
from iceaggr.common import DataError


@pytest.fixture
def truth():
    "Four events with directions known by heart: up, down, east, north."
    return pd.DataFrame({"event_id": [11, 7, 30, 2], "azimuth": [0, 0, 0, math.pi / 2], "zenith": [0, math.pi, math.pi / 2, math.pi / 2],
                         "n_pulses": [20, 40, 40, 5000], "type": ["cascade", "track", "track", "track"], "energy": [100.0, 1e3, np.nan, 1e5]})


def shifted(frame, degrees):
    "Predictions that are wrong by given angles along the meridian."
    z = frame.zenith - np.radians(degrees) * np.where(frame.zenith > 0, 1, -1)
    return frame[["event_id", "azimuth"]].assign(zenith=z)


def test_known_errors_whatever_the_order(truth):
    wanted = pd.Series([1.0, 2, 30, 90], index=truth.event_id)
    predictions = shifted(truth, wanted.to_numpy()).iloc[[2, 0, 3, 1]]
    events = event_errors(predictions, truth)
    assert np.allclose(events.set_index("event_id").error.loc[wanted.index], wanted)
    m = evaluate(predictions, truth)
    assert m["n_events"] == 4 and math.isclose(m["model"]["mean_degrees"], 123 / 4) and math.isclose(m["model"]["median_degrees"], 16)
    assert math.isclose(m["model"]["mean_rad"], math.radians(123 / 4)) and "line_fit" not in m
    types = {r["name"]: r for r in m["by"]["type"]}
    assert types["cascade"]["n"] == 1 and types["track"]["n"] == 3 and math.isclose(types["track"]["model"]["median"], 30)
    assert sum(r["n"] for r in m["by"]["energy"]) == 3                    # one energy is unknown
    assert [(r["low"], r["n"]) for r in m["by"]["n_pulses"]] == [(0, 1), (32, 2), (4096, 1)]


def test_azimuth_wraps():
    truth = pd.DataFrame({"event_id": [1, 2], "azimuth": [0.01, 2 * math.pi - 0.01], "zenith": [math.pi / 2] * 2})
    m = evaluate(truth.assign(azimuth=truth.azimuth.to_numpy()[::-1]), truth)["model"]
    assert math.isclose(m["mean_rad"], 0.02, rel_tol=1e-9) and abs(m["bias_azimuth_degrees"]) < 1e-9


def test_baseline_gain(truth):
    m = evaluate(shifted(truth, [1, 1, 1, 9]), truth, shifted(truth, [2, 2, 2, 2]))
    assert math.isclose(m["gain"]["mean_degrees"], -1) and math.isclose(m["gain"]["share_better"], 0.75)
    assert math.isclose(m["line_fit"]["mean_degrees"], 2) and m["by"]["type"][0]["line_fit"]["median"] == pytest.approx(2)


def test_bootstrap_matches_the_formula():
    x = np.random.default_rng(0).exponential(1, 4000)
    assert abs(_bootstrap(np.mean, x, resamples=400) / (x.std() / math.sqrt(4000)) - 1) < 0.15
    assert _bootstrap(np.mean, x, resamples=50) == _bootstrap(np.mean, x, resamples=50)      # seeded
    big = np.random.default_rng(0).normal(size=500_000)
    assert abs(_bootstrap(np.mean, big, resamples=50) * math.sqrt(500_000) - 1) < 0.35      # scaled from a part


@pytest.mark.parametrize("kappa", [1e-3, 1.0, 50.0, 1e5])
def test_calibrated_kappa_is_called_calibrated(kappa):
    import torch
    from iceaggr.direction import angles_to_vector, vector_to_angles, vmf_sample
    n, rng = 4000, np.random.default_rng(3)
    truth = pd.DataFrame({"event_id": np.arange(n), "azimuth": rng.uniform(0, 2 * math.pi, n), "zenith": np.arccos(rng.uniform(-1, 1, n))})
    v = angles_to_vector(truth.azimuth.to_numpy(), truth.zenith.to_numpy())
    az, zen = vector_to_angles(vmf_sample(v, torch.full((n,), kappa), generator=torch.Generator().manual_seed(2))[0])
    c = evaluate(pd.DataFrame({"event_id": np.arange(n), "azimuth": az, "zenith": zen, "kappa": kappa}), truth)["calibration"]
    assert all(abs(c["coverage"][str(p)] - p / 100) < 0.03 for p in (50, 68, 90))
    assert abs(c["pull_median"] - c["pull_expected_median"]) < 0.06 and abs(c["pull_beyond_3"] - c["pull_expected_beyond_3"]) < 0.01
    if kappa >= 1: assert 0.85 < c["likelihood_scale"] < 1.15


GOOD = pd.DataFrame({"event_id": [5, 6, 7], "azimuth": [0.0, 1, 6], "zenith": [0.1, 1, 3]})

BAD = {
    "column": (GOOD.drop(columns="zenith"), "no column zenith"),
    "duplicate": (GOOD.assign(event_id=[5, 6, 5]), "duplicated: 1 rows, first events 5"),
    "nan": (GOOD.assign(azimuth=[0, np.nan, 1]), r"1 values of azimuth .* row 1 \(event 6\)"),
    "infinite": (GOOD.assign(zenith=[0, np.inf, 1]), "values of zenith"),
    "text": (GOOD.assign(zenith=["a", "1", "2"]), "values of zenith"),
    "degrees": (GOOD.assign(zenith=[10.0, 90, 170]), "radians"),
    "azimuth in degrees": (GOOD.assign(azimuth=[10.0, 90, 170]), "radians"),
    "fraction": (GOOD.assign(event_id=[5, 6.5, 7]), "whole number"),
    "fraction as text": (GOOD.assign(event_id=["5", "6.5", "7"]), "whole number"),
    "kappa": (GOOD.assign(kappa=[1, -1, 1]), "kappa is negative"),
    "kappa nan": (GOOD.assign(kappa=[1, np.nan, 1]), "values of kappa"),
    "r68": (GOOD.assign(r68=[1, 200, 1]), "r68 is outside"),
    "empty": (GOOD[:0], "no rows"),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_bad_files_are_refused_by_name(fault, ending, tmp_path):
    frame, message = BAD[fault]
    path = tmp_path / f"p{ending}"
    frame.to_csv(path, index=False) if ending == ".csv" else frame.to_parquet(path, index=False)
    with pytest.raises(DataError, match=f"{re.escape(str(path))}: .*{message}"): read_predictions(path)


def test_files_that_are_no_tables(tmp_path):
    for name, content in [("p.csv", b""), ("p.parquet", b"not parquet"), ("q.parquet", b""), ("p.txt", b"event_id")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name): read_predictions(tmp_path / name)
    with pytest.raises(DataError, match="no such file"): read_predictions(tmp_path / "none.csv")


def test_good_files_come_back(tmp_path):
    GOOD.to_csv(tmp_path / "a.csv", index=False); GOOD.to_parquet(tmp_path / "a.parquet"); GOOD.set_index("event_id").to_parquet(tmp_path / "b.parquet")
    GOOD.assign(comment="x").to_csv(tmp_path / "c.csv", index=False)
    for name in ("a.csv", "a.parquet", "b.parquet", "c.csv"): pd.testing.assert_frame_equal(read_predictions(tmp_path / name), GOOD)
    assert check_predictions(GOOD.assign(event_id=[2**53 + 1, 2**53 + 2, 2**53 + 3])).event_id[0] == 2**53 + 1      # ids keep all digits
    assert check_predictions(GOOD.assign(event_id=[str(2**53 + 1), "6", "7"])).event_id.tolist() == [2**53 + 1, 6, 7] and check_predictions(GOOD.assign(event_id=["5.0", "6", "7"])).event_id.tolist() == [5, 6, 7]


def test_events_of_truth_and_predictions(truth):
    with pytest.raises(DataError, match="2 of 6 events are not in the data: 99, 100"):
        event_errors(pd.concat([truth[["event_id", "azimuth", "zenith"]], pd.DataFrame({"event_id": [99, 100], "azimuth": 0.0, "zenith": 0.0})]), truth)
    with pytest.raises(DataError, match="baseline: 1 of 4 events are missing: 7"):
        event_errors(truth[["event_id", "azimuth", "zenith"]], truth, truth[truth.event_id != 7])
    assert len(event_errors(truth[["event_id", "azimuth", "zenith"]][:2], truth)) == 2
    with pytest.raises(DataError, match="duplicated"): event_errors(GOOD, pd.concat([GOOD, GOOD]))


def test_line_fit_ignores_the_other_events():
    rng = np.random.default_rng(1)
    xyz = rng.normal(0, 300, (50, 3))
    p = np.stack([rng.uniform(9e3, 1.2e4, 90), rng.exponential(1, 90), rng.integers(0, 50, 90), rng.random(90) < 0.4], -1).astype(np.float32)
    event = np.repeat([0, 1, 2], 30)
    together = line_fit(p, xyz, event, 3)
    for k in range(3): assert np.allclose(line_fit(p[event == k], xyz)[0], together[k], atol=1e-12)
    shuffled = rng.permutation(90)
    assert np.allclose(line_fit(p[shuffled], xyz, event[shuffled], 3), together, atol=1e-9)
    assert np.allclose(np.linalg.norm(together, axis=1), 1)
    for odd in (np.zeros((0, 4)), [[1e4, 0.0, 3, 0], [1.1e4, 0, 4, 0]], [[1e4, 1, 3, 0]]):      # no pulse, no charge, one pulse
        assert np.allclose(line_fit(np.array(odd), xyz), [[0, 0, 1]])


def test_a_whole_data_set(tiny_dataset, tmp_path):
    meta = pd.read_parquet(tiny_dataset / "train_meta.parquet")
    first = meta[meta.batch_id == meta.batch_id.min()]
    rng = np.random.default_rng(0)
    p = pd.DataFrame({"event_id": first.event_id, "azimuth": first.azimuth, "zenith": np.clip(first.zenith + rng.normal(0, 0.05, len(first)), 0, math.pi), "kappa": 400.0})
    p.to_parquet(tmp_path / "p.parquet", index=False)
    m = evaluate_dataset(tmp_path / "p.parquet", tiny_dataset, tmp_path / "out", progress=False)
    assert m["n_events"] == len(first) and m["n_missing"] == 0 and m["batches"] == [int(first.batch_id.iloc[0])]
    assert m["model"]["mean_degrees"] < 5 and m["line_fit"]["n"] == len(first)
    page = (tmp_path / "out" / "report.html").read_text()
    saved = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in the JSON"))
    assert saved["model"]["mean_degrees"] == m["model"]["mean_degrees"] and f"{len(first):,} events of batch" in page and "line fit" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and not list((tmp_path / "out").glob(".*"))
    pngs = sorted((tmp_path / "out").glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pngs) >= 6 and all(f.read_bytes()[:4] == b"\x89PNG" for f in pngs)
    assert (tmp_path / "out/calibration.png").exists()
    with pytest.warns(UserWarning, match="every error is zero"): evaluate_dataset(first[["event_id", "azimuth", "zenith"]], tiny_dataset, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/calibration.png").exists() and len(list((tmp_path / "out").glob("*.png"))) == len(pngs) - 1      # none of the earlier report is left


def test_prepared_form_gives_the_same(tiny_dataset, tmp_path):
    from iceaggr.engine.prepare import prepare
    p = pd.read_parquet(tiny_dataset / "train_meta.parquet").query("batch_id != 3")[["event_id", "azimuth", "zenith"]]
    p["zenith"] = (p.zenith + 0.1).clip(upper=math.pi)
    assert evaluate_dataset(p, tiny_dataset, progress=False) == evaluate_dataset(p, prepare(tiny_dataset, tmp_path / "tiny2" / "tiny", progress=False), progress=False)


def test_gaps_are_left_out_of_a_table_as_of_a_file(tiny_dataset, tmp_path):
    p = pd.read_parquet(tiny_dataset / "train_meta.parquet")[["event_id", "azimuth", "zenith"]]
    p.loc[3, ["azimuth", "zenith"]] = np.nan
    p.to_csv(tmp_path / "p.csv", index=False)
    for given in (p, tmp_path / "p.csv"):
        with pytest.raises(DataError, match=rf"event {p.event_id[3]}\): predict them, or leave them out with .*--on-bad-event skip"): evaluate_dataset(given, tiny_dataset, progress=False)
        with pytest.warns(UserWarning, match=f"1 of {len(p)} events of the same batches have no prediction: {p.event_id[3]}"):
            assert evaluate_dataset(given, tiny_dataset, progress=False, on_bad_event="skip")["n_events"] == len(p) - 1


def test_a_damaged_file_of_others(tiny_dataset, tmp_path):
    from iceaggr.engine.prepare import prepare
    p = pd.read_parquet(tiny_dataset / "train_meta.parquet").query("batch_id != 3")[["event_id", "azimuth", "zenith"]]
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    (out / "train/batch_3.events.arrow").write_bytes(b"not Arrow")
    with pytest.raises(DataError, match="batch_3.events.arrow"): evaluate_dataset(p, out, progress=False)
    with pytest.warns(UserWarning, match="left out"): assert evaluate_dataset(p, out, progress=False, on_bad_event="skip")["n_events"] == len(p)


def test_part_of_a_batch_is_said(tiny_dataset):
    meta = pd.read_parquet(tiny_dataset / "train_meta.parquet")
    batch = meta[meta.batch_id == meta.batch_id.max()]
    with pytest.warns(UserWarning, match=rf"1 of {len(batch):,} events of the same batches have no prediction: {batch.event_id.iloc[0]}"):
        m = evaluate_dataset(batch[["event_id", "azimuth", "zenith"]].iloc[1:], tiny_dataset, progress=False)
    assert m["n_missing"] == 1 and m["model"]["mean_degrees"] < 1e-4 and m["calibration"] == {}


def test_events_of_another_data_set(tiny_dataset, tmp_path):
    GOOD.assign(event_id=[10**12, 10**12 + 1, 10**12 + 2]).to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="p.csv: 3 of 3 events are not in the train split"): evaluate_dataset(tmp_path / "p.csv", tiny_dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no true directions"): evaluate_dataset(GOOD, tiny_dataset, split="test")
    with pytest.raises(DataError, match="nowhere"): evaluate_dataset(GOOD, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"): evaluate_dataset(GOOD, tmp_path / "empty")


def test_truth_that_cannot_be_used(tiny_dataset):
    from iceaggr.data import IceCubeDataset
    from iceaggr.evaluation import event_truth
    ds, path = IceCubeDataset(tiny_dataset), tiny_dataset / "truth.parquet"
    good = ds.event_table()[["batch_id", "event_id"]].assign(energy=np.arange(21.), type="track")
    good.to_parquet(path, write_page_checksum=True)
    assert event_truth(ds, tiny_dataset).energy.tolist() == good.energy.tolist()
    data = path.read_bytes()
    def damage(): path.write_bytes(data[:400] + b"\xff" * 200 + data[600:])
    for change, said in ((lambda: good.assign(event_id=good.event_id.astype(str)).to_parquet(path), "column event_id should hold whole numbers"), (lambda: good.assign(energy="x").to_parquet(path), "column energy should hold numbers"),
                         (lambda: good.drop(columns="event_id").to_parquet(path), "column event_id is missing"), (lambda: good.assign(event_id=good.event_id.astype("Int64").mask(good.event_id == 3000)).to_parquet(path), "column event_id: 1 values are missing"),
                         (damage, "damaged"), (lambda: path.write_bytes(data[:-9]), "not a Parquet file, or cut short")):
        change()
        with pytest.raises(DataError, match=f"truth.parquet: {said}"): event_truth(ds, tiny_dataset)


def test_find_events_streams(tmp_path):
    meta = pd.DataFrame({"batch_id": np.repeat([1, 2, 3], 1000).astype(np.int32), "event_id": np.random.default_rng(0).permutation(3000) + 10})
    meta.to_parquet(tmp_path / "m.parquet", row_group_size=300)
    some = meta.sample(50, random_state=1)
    found = find_events(tmp_path / "m.parquet", some.event_id.to_numpy()).set_index("event_id").batch_id
    assert (found.loc[some.event_id].to_numpy() == some.batch_id.to_numpy()).all() and len(found) == 50
    assert len(find_events(tmp_path / "m.parquet", np.array([1, 99999]))) == 0


def test_report_escapes_what_it_is_given(truth, tmp_path):
    m = evaluate(shifted(truth, [1, 2, 3, 4]), truth.assign(type=["<b>x</b>"] * 4))
    page = write_report(m, {}, tmp_path / "deep" / "out", title="a < b & c").read_text()
    assert "<b>x</b>" not in page and "a &lt; b &amp; c" in page


def test_ppc_line_fit(ppc_root):
    "The figures of the data's own description."
    from iceaggr.data import IceCubeDataset
    from iceaggr.evaluation import event_truth
    from iceaggr.line_fit import line_fit_events
    dataset = IceCubeDataset(ppc_root, batch_ids=[4])
    m = evaluate(line_fit_events(dataset), event_truth(dataset, ppc_root))
    median = {r["name"]: r["model"]["median"] for r in m["by"]["type"]}
    assert abs(m["model"]["mean_degrees"] - 35.2) < 0.1 and abs(median["track_through"] - 4.6) < 0.1
    assert abs(median["track_starting"] - 11.8) < 0.1 and abs(median["cascade"] - 83.1) < 0.1
