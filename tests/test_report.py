"""The report: whole data sets, gaps, damaged files, the page and its numbers."""
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
from test_jupyterlab import chromium  # noqa: F401

from iceaggr.common import DataError
from iceaggr.engine.prepare import prepare
from iceaggr.evaluation import evaluate, plot_binned
from iceaggr.report import _plain, evaluate_dataset, find_events, write_report

ANGLES = ["event_id", "azimuth", "zenith"]


def meta_of(root):
    "The true directions of a data set."
    return pd.read_parquet(root / "train_meta.parquet")


@pytest.fixture
def predictions_of_a_batch(tiny_dataset):
    "Directions of the first batch, blurred by about 3 degrees, with kappa."
    meta = meta_of(tiny_dataset)
    first = meta[meta.batch_id == meta.batch_id.min()]
    noise = np.random.default_rng(0).normal(0, 0.05, len(first))
    return first.assign(zenith=np.clip(first.zenith + noise, 0, math.pi), kappa=400.0)


def test_report_of_a_data_set(tiny_dataset, predictions_of_a_batch, tmp_path):
    "Metrics, JSON, page and figures of one batch."
    given, out = predictions_of_a_batch, tmp_path / "out"
    given[[*ANGLES, "kappa"]].to_parquet(tmp_path / "p.parquet", index=False)
    metrics = evaluate_dataset(tmp_path / "p.parquet", tiny_dataset, out, progress=False)
    assert metrics["n_events"] == len(given) and metrics["n_missing"] == 0
    assert metrics["batches"] == [int(given.batch_id.iloc[0])]
    assert metrics["model"]["mean_degrees"] < 5 and metrics["line_fit"]["n"] == len(given)
    text = (out / "metrics.json").read_text()
    saved = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in the JSON"))
    assert saved["model"]["mean_degrees"] == metrics["model"]["mean_degrees"]
    page = (out / "report.html").read_text()
    assert f"{len(given):,} events of batch" in page and "line fit" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page) and not list(out.glob(".*"))
    pngs = sorted(out.glob("*.png"))
    assert page.count("data:image/png;base64,") == len(pngs) >= 6
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in pngs)


# What is wrong with a page: wider than the window, small type, little contrast.
FAULTS = """() => {
    const shade = text => {
        const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
            .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
    };
    const ground = e => {
        const colour = getComputedStyle(e).backgroundColor;
        return colour === 'rgba(0, 0, 0, 0)' ? ground(e.parentElement) : colour;
    };
    document.querySelectorAll('details').forEach(d => d.open = true);
    const faults = [], root = document.documentElement;
    if (root.scrollWidth > innerWidth) faults.push(`${root.scrollWidth} px wide`);
    for (const e of document.body.querySelectorAll('*')) {
        if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
        const style = getComputedStyle(e), tones = [shade(style.color), shade(ground(e))];
        if (parseFloat(style.fontSize) < 15) faults.push(`${e.tagName}: ${style.fontSize}`);
        const contrast = Math.max(...tones) / Math.min(...tones);
        if (contrast < 4.5) faults.push(`${e.tagName} ${e.className}: contrast ${contrast}`);
    }
    for (const image of document.images) {
        const size = 15.3 * image.clientWidth / (image.naturalWidth / 2);     // of type of 10 pt
        if (size < (innerWidth < 1000 ? 12 : 15)) faults.push(`${image.alt}: type of ${size} px`);
    }
    return faults;
}"""


def test_the_page_can_be_read_on_any_screen(tiny_dataset, predictions_of_a_batch, tmp_path, chromium):  # noqa: F811
    evaluate_dataset(predictions_of_a_batch, tiny_dataset, tmp_path / "out", progress=False)
    for scheme in ("light", "dark"):
        page = chromium.new_page(viewport=dict(width=1400, height=900), color_scheme=scheme)
        fetched = []
        page.on("request", lambda request, fetched=fetched: fetched.append(request.url.partition(":")[0]))
        page.goto((tmp_path / "out/report.html").as_uri())
        for width in (1400, 400):
            page.set_viewport_size(dict(width=width, height=900))
            assert page.evaluate(FAULTS) == [], (scheme, width)
        assert set(fetched) <= {"file", "data"}
        page.close()


def test_tables_and_folds_have_names(tiny_dataset, predictions_of_a_batch, tmp_path):
    metrics = evaluate_dataset(predictions_of_a_batch, tiny_dataset, progress=False)
    page = write_report(metrics, {}, tmp_path / "out").read_text()
    captions = re.findall(r"<table><caption>(.+?)</caption>", page)
    assert len(set(captions)) == page.count("<table") >= 5
    folds = re.findall(r"<summary>(.+?)</summary>", page)
    assert len(set(folds)) == page.count("<details>") >= 2 and all(text.startswith("Table") for text in folds)


def test_bands_can_be_told_apart_where_they_overlap(tiny_dataset, predictions_of_a_batch):
    "Without colours: one is hatched, the other filled; the lines differ as well."
    metrics = evaluate_dataset(predictions_of_a_batch, tiny_dataset, progress=False)
    ax, = plot_binned(metrics, "zenith").axes
    hatched, filled = ax.collections
    assert hatched.get_hatch() and not filled.get_hatch()
    assert not len(hatched.get_facecolor()) and 0 < filled.get_facecolor()[0, 3] < 0.5
    assert len({(line.get_marker(), line.get_linestyle()) for line in ax.lines}) == 2


def test_a_second_report_replaces_the_first(tiny_dataset, predictions_of_a_batch, tmp_path):
    "Without kappa there is no figure of calibration, and the one of the first report is removed."
    out, ids = tmp_path / "out", predictions_of_a_batch.event_id
    evaluate_dataset(predictions_of_a_batch, tiny_dataset, out, progress=False)
    before = len(list(out.glob("*.png")))
    assert (out / "calibration.png").exists()
    meta = meta_of(tiny_dataset)
    perfect = meta[meta.event_id.isin(ids)][ANGLES]
    with pytest.warns(UserWarning, match="every error is zero"):
        evaluate_dataset(perfect, tiny_dataset, out, progress=False)
    assert not (out / "calibration.png").exists() and len(list(out.glob("*.png"))) == before - 1


def test_prepared_form_gives_the_same(tiny_dataset, tmp_path):
    "Metrics do not depend on the form of the data set."
    predictions = meta_of(tiny_dataset).query("batch_id != 3")[ANGLES]
    predictions["zenith"] = (predictions.zenith + 0.1).clip(upper=math.pi)
    prepared = prepare(tiny_dataset, tmp_path / "tiny2" / "tiny", progress=False)
    expected = evaluate_dataset(predictions, tiny_dataset, progress=False)
    assert evaluate_dataset(predictions, prepared, progress=False) == expected


@pytest.mark.parametrize("as_file", [False, True])
def test_gaps_are_left_out(tiny_dataset, tmp_path, as_file):
    "A missing prediction is an error that names its event, or is left out on request."
    given = table = meta_of(tiny_dataset)[ANGLES]
    table.loc[3, ["azimuth", "zenith"]] = np.nan
    table["zenith"] = (table.zenith + 0.1).clip(upper=math.pi)
    gap = table.event_id[3]
    if as_file:
        given = tmp_path / "p.csv"
        table.to_csv(given, index=False)
    message = rf"event {gap}\): predict them, or leave them out with .*--on-bad-event skip"
    with pytest.raises(DataError, match=message): evaluate_dataset(given, tiny_dataset, progress=False)
    message = f"1 of {len(table)} events of the same batches have no prediction: {gap}"
    with pytest.warns(UserWarning, match=message):
        metrics = evaluate_dataset(given, tiny_dataset, progress=False, on_bad_event="skip")
    assert metrics["n_events"] == len(table) - 1


def test_a_damaged_file_of_others(tiny_dataset, tmp_path):
    "A damaged file without predicted events is an error that names it, or is left out on request."
    predictions = meta_of(tiny_dataset).query("batch_id != 3")[ANGLES]
    predictions["zenith"] = (predictions.zenith + 0.1).clip(upper=math.pi)
    out = prepare(tiny_dataset, tmp_path / "out", progress=False)
    (out / "train/batch_3.events.arrow").write_bytes(b"not Arrow")
    with pytest.raises(DataError, match="batch_3.events.arrow"):
        evaluate_dataset(predictions, out, progress=False)
    with pytest.warns(UserWarning, match="left out"):
        metrics = evaluate_dataset(predictions, out, progress=False, on_bad_event="skip")
    assert metrics["n_events"] == len(predictions)


def test_a_part_of_a_batch_gives_a_warning(tiny_dataset):
    "Events of the same batch without a prediction are counted and named."
    meta = meta_of(tiny_dataset)
    batch = meta[meta.batch_id == meta.batch_id.max()]
    count = rf"1 of {len(batch):,} events of the same batches have no prediction: {batch.event_id.iloc[0]}"
    with pytest.warns(UserWarning) as caught:
        metrics = evaluate_dataset(batch[ANGLES].iloc[1:], tiny_dataset, progress=False)
    messages = [str(w.message) for w in caught]
    assert any(count in message for message in messages)
    assert any("every error is zero" in message for message in messages)
    assert metrics["n_missing"] == 1 and metrics["model"]["mean_degrees"] < 1e-4
    assert metrics["calibration"] == {}


def test_events_of_another_data_set(tiny_dataset, tmp_path):
    "Unknown events, the test split and folders without data are refused; no report is written."
    unknown = pd.DataFrame({"event_id": 10**12 + np.arange(3), "azimuth": 0.0, "zenith": 1.0})
    unknown.to_csv(tmp_path / "p.csv", index=False)
    with pytest.raises(DataError, match="p.csv: 3 of 3 events are not in the train split"):
        evaluate_dataset(tmp_path / "p.csv", tiny_dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no true directions"):
        evaluate_dataset(unknown, tiny_dataset, split="test")
    with pytest.raises(DataError, match="nowhere"): evaluate_dataset(unknown, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"): evaluate_dataset(unknown, tmp_path / "empty")


def test_events_are_found_in_pieces_of_the_meta_table(tmp_path):
    "Batches of some events of a table with several row groups; unknown ids are left out."
    ids = np.random.default_rng(0).permutation(3000) + 10
    meta = pd.DataFrame({"batch_id": np.repeat([1, 2, 3], 1000).astype(np.int32), "event_id": ids})
    meta.to_parquet(tmp_path / "m.parquet", row_group_size=300)
    some = meta.sample(50, random_state=1)
    found = find_events(tmp_path / "m.parquet", some.event_id.to_numpy()).set_index("event_id").batch_id
    assert len(found) == 50
    assert (found.loc[some.event_id].to_numpy() == some.batch_id.to_numpy()).all()
    assert len(find_events(tmp_path / "m.parquet", np.array([1, 99999]))) == 0


def test_report_escapes_text(tmp_path):
    "Names of types and the title cannot inject HTML."
    kind = "<b>x\x1b[31m</b>"
    truth = pd.DataFrame({"event_id": [1, 2], "azimuth": 0.0, "zenith": [1.0, 2.0], "type": kind})
    metrics = evaluate(truth.assign(zenith=[1.1, 2.1]), truth)
    page = write_report(metrics, {}, tmp_path / "deep" / "out", title="a < b & c").read_text()
    assert "<b>x" not in page and "\x1b" not in page and "a &lt; b &amp; c" in page


def test_numbers_for_json():
    "NumPy numbers become Python's; infinities and NaN become None."
    given = {"a": np.float32(1), "b": [math.inf, np.int64(2)], 3: np.nan}
    assert json.dumps(_plain(given)) == '{"a": 1.0, "b": [null, 2], "3": null}'
