"The event browser, driven by setting the values of its widgets, without a browser."
import numpy as np
import pandas as pd
import pytest
import torch

from iceaggr.browser import _ORDERS, EventBrowser, _choose_events, _facts, _show_dom
from iceaggr.data import IceCubeDataset
from iceaggr.density import mixture_of
from iceaggr.direction import angles_to_vector
from iceaggr.display import across_flight
from iceaggr.evaluation import check_predictions
from iceaggr.io.kaggle import find_batches
from iceaggr.line_fit import line_fit_events
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.simulation.dataset import simulate_dataset

PREDICTED = 60    # events of the file that the runs have predicted


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Two files of simulated events."
    return simulate_dataset(tmp_path_factory.mktemp("browser") / "data", 120, seed=5, events_per_file=80)


@pytest.fixture(scope="module")
def batch(root):
    "The first file."
    return find_batches(root)[0]


@pytest.fixture(scope="module")
def dataset(root, batch):
    "The events of the first file."
    return IceCubeDataset(root, batch_ids=[batch])


@pytest.fixture(scope="module")
def model(dataset):
    "A small model without training, for the detector of the events."
    torch.manual_seed(0)
    return HierarchicalTransformer("small", dataset.geometry).eval()


@pytest.fixture(scope="module")
def runs(dataset, model):
    "Predictions of two runs for the first events of the file."
    first = np.arange(PREDICTED)
    return {"line fit": line_fit_events(dataset, indices=first),
            "small": predict_dataset(model, dataset, first, progress=False)}


@pytest.fixture
def browser(root, batch, runs, model):
    "A new browser of the first file."
    browser = EventBrowser(root, runs, model=model)
    browser.widgets["file"].value = batch
    return browser


def part(browser, meta):
    "A trace of the figure by its name."
    return next(t for t in browser.figure.data if t.meta == meta)


def shown_balls(browser):
    "How many DOMs are shown."
    return int((part(browser, "light").marker.size > 0).sum())


def check_shown(browser, runs):
    "The figure holds the event and no other: its lit DOMs, its light until now, its predictions."
    event = browser.dataset[browser.row]
    time, charge, sensor, auxiliary = event["pulse_features"].numpy().T
    proper, until = auxiliary == 0, browser.times[browser.widgets["moment"].value]
    lit = np.unique(sensor[proper]).astype(int)
    light = part(browser, "light")
    assert np.allclose(np.stack([light[c] for c in "xyz"], 1), browser.dataset.geometry.xyz[lit], atol=1e-3)
    received = charge[proper & (time <= until)].sum()
    assert np.isclose(part(browser, "charge of strings").y.sum(), received, rtol=1e-4)
    first = np.array([time[proper & (sensor == s)].min() for s in lit])
    assert ((light.marker.size > 0) == (first <= until)).all()
    event_id = int(event["event_id"])
    for name, frame in runs.items(): check_path(browser, name, frame[frame.event_id == event_id])


def check_path(browser, name, prediction):
    "A path for a prediction, none without one, against the direction it came from."
    has_path = any(t.meta == f"path {name}" for t in browser.figure.data)
    assert has_path == bool(len(prediction))
    if not has_path: return
    flown = np.array([np.diff(part(browser, f"path {name}")[c])[0] for c in "xyz"])
    azimuth, zenith = torch.tensor(prediction[["azimuth", "zenith"]].to_numpy(np.float64)[0])
    came_from = angles_to_vector(azimuth, zenith).numpy()
    assert np.allclose(flown / np.linalg.norm(flown), -came_from, atol=1e-5)


# The table of events

TABLE = pd.DataFrame({"event_id": range(5), "n_pulses": [20, 50, 90, 400, 60], "type": list("abaab"),
                      "error A": [5, 50, np.nan, 2, 120.], "error B": [8, 10, np.nan, 3, 100.]})


def test_region_of_a_density_takes_the_place_of_the_cone(root, batch, dataset):
    "Its border holds 68 %, whatever its shape."
    model = HierarchicalTransformer.from_pretrained("small")
    table = predict_dataset(model, dataset, range(5), progress=False, density=True)
    browser = EventBrowser(root, {"small": table})
    browser.widgets["file"].value = batch
    event = int(table.event_id[3])
    browser.widgets["event_id"].value = str(event)
    [arrow] = [a for a in browser.view.arrows if a.name == "small"]
    density = mixture_of(table[table.event_id == event])
    levels = density[[0] * 48].credible_level(torch.from_numpy(arrow.region))
    assert arrow.region.shape == (48, 3) and (levels - 0.68).abs().max() < 0.05


def test_filters_choose_events():
    "By type, pulses and error; events without a prediction pass the whole range only."
    assert _choose_events(TABLE).tolist() == [0, 1, 2, 3, 4]
    assert _choose_events(TABLE, "a", (30, 500)).tolist() == [2, 3]
    assert _choose_events(TABLE, error=(3, 60), run="A").tolist() == [0, 1]
    assert _choose_events(TABLE, run="A").tolist() == [0, 1, 2, 3, 4]
    assert len(_choose_events(TABLE, "c")) == 0


@pytest.mark.parametrize(("order", "expected"), list(zip(
    _ORDERS[1:], [[3, 2, 4, 1, 0], [4, 1, 0, 3, 2], [3, 0, 1, 4, 2], [1, 4, 0, 3, 2]], strict=True)))
def test_orders_sort_events(order, expected):
    "Events without a prediction come last."
    assert _choose_events(TABLE, run="A", order=order).tolist() == expected


# Widgets

def test_first_event_is_shown(browser, runs):
    "With the predictions of both runs."
    assert browser.row == 0
    check_shown(browser, runs)


def test_filters_and_orders(browser, runs):
    "The events that pass, in order; the one shown is among them."
    widgets, table = browser.widgets, browser.table
    widgets["pulses"].value = (32, 256)
    widgets["run"].value = "small"
    widgets["order"].value = "largest error first"
    assert table.n_pulses.iloc[browser.rows].between(32, 256).all()
    assert str(len(browser.rows)) in widgets["count"].value
    assert browser.row == browser.rows[0] and widgets["place"].value == 1       # an order starts anew
    errors = table["error small"].to_numpy()[browser.rows]
    assert table["error small"][browser.row] == np.nanmax(errors)
    check_shown(browser, runs)


def test_type_and_error(browser, runs):
    "Both filters at once."
    widgets, table = browser.widgets, browser.table
    kind = table.type.dropna().mode()[0]
    widgets["kind"].value = kind
    assert len(browser.rows) and (table.type.iloc[browser.rows] == kind).all()
    widgets["run"].value = "small"
    widgets["error"].value = (20, 150)
    assert table["error small"].iloc[browser.rows].between(20, 150).all() and browser.row in browser.rows
    check_shown(browser, runs)


def test_time_slider_and_next_event(browser, runs):
    "Fewer balls earlier; the next event keeps the step of time; noise can be switched off."
    widgets, whole = browser.widgets, shown_balls(browser)
    widgets["moment"].value = 12
    assert 0 < shown_balls(browser) < whole and widgets["until"].value.startswith("light until")
    check_shown(browser, runs)
    widgets["forward"].click()
    assert browser.row == browser.rows[1] and widgets["place"].value == 2
    check_shown(browser, runs)
    widgets["back"].click()
    widgets["back"].click()
    assert browser.row == browser.rows[0] and widgets["place"].value == 1
    widgets["noise"].value = False
    assert part(browser, "noise").visible is False and part(browser, "noise in time").visible is False


def test_event_ids(browser, runs):
    "Jumps, and what is said of ids that are not there."
    widgets = browser.widgets
    widgets["event_id"].value = str(browser.table.event_id.iloc[7])
    assert browser.row == 7
    check_shown(browser, runs)
    facts = widgets["facts"].value
    assert "<table>" in facts
    widgets["event_id"].value = "17x"
    assert "not in this file" in widgets["facts"].value
    widgets["event_id"].value = str(browser.table.event_id.iloc[7])      # the one that is shown
    assert widgets["facts"].value == facts


def test_nothing_passes(browser, runs):
    "The figure stays; the event returns with the filters."
    widgets = browser.widgets
    facts, here = widgets["facts"].value, str(browser.table.event_id.iloc[browser.row])
    widgets["pulses"].value, widgets["error"].value = (16384, np.inf), (179, 180)
    assert len(browser.rows) == 0 and "No event" in widgets["facts"].value
    widgets["event_id"].value = here
    assert "does not pass" in widgets["facts"].value
    widgets["pulses"].value, widgets["error"].value = (0, np.inf), (0, 180)
    assert here in browser.figure.layout.title.text and widgets["facts"].value == facts
    check_shown(browser, runs)


def test_event_without_predictions(browser, runs):
    "The truth and no other path; the facts say so."
    browser.widgets["place"].value = len(browser.table)
    assert browser.row == len(browser.table) - 1 >= PREDICTED
    assert browser.widgets["facts"].value.count("no prediction") == len(runs)
    check_shown(browser, runs)


def test_close_up_of_doms(browser):
    "A picture for a DOM with several pulses, a message for one with a single pulse."
    lit, widgets = browser.view.lit, browser.widgets
    facts, close_up, beside = widgets["facts"].value, widgets["close_up"], widgets["beside"].layout
    several = int(lit.sensor_id[lit.n_pulses > 1].iloc[0])
    single = int(lit.sensor_id[lit.n_pulses == 1].iloc[0])
    for sensor in (several, single, single, several):
        _show_dom(browser, sensor)
        if sensor == several:
            assert bytes(close_up.value).startswith(b"\x89PNG") and beside.display == "flex"
            assert widgets["facts"].value == facts
        else:
            assert beside.display == "none"
            message = widgets["facts"].value.removeprefix(f"{facts}<br>")
            assert f"sensor {single} has a single pulse" in message and "<br>" not in message


def test_predictions_from_files_and_other_files(root, batch, runs, tmp_path):
    "A table on disk is as good; another file has another table."
    runs["small"].to_parquet(tmp_path / "p.parquet")
    browser = EventBrowser(root, {"from a file": tmp_path / "p.parquet"})
    assert browser.runs["from a file"].equals(check_predictions(runs["small"]))
    for file in browser.widgets["file"].options:
        browser.widgets["file"].value = file
        assert browser.dataset.batch_ids[0] == file and len(browser.table) == len(browser.dataset)


def test_browser_without_predictions(root):
    "No run to choose, no close-up without a model."
    browser = EventBrowser(root)
    assert browser.widgets["run"].value == "no predictions"
    _show_dom(browser, int(browser.view.lit.sensor_id.iloc[0]))
    assert browser.widgets["beside"].layout.display == "none"
    browser.widgets["order"].value = "largest error first"
    assert browser.row == 0


def test_selectors_name_their_choice(browser, root):
    "ipywidgets shows a blank where the value is None."
    for each in (browser, EventBrowser(root)):
        for name in ("kind", "run", "order", "file"): assert each.widgets[name].value is not None
    assert browser.widgets["kind"].value == browser.widgets["kind"].label == "all"


def test_numbers_are_written_with_their_unit(browser):
    "Three digits, in the unit that suits an energy."
    record = browser.table.iloc[0].copy()
    record["energy"], record["type"] = 13_310_000., "track_through"
    browser.view.lit.loc[:, "charge"] *= 41_234 / browser.view.lit.charge.sum()
    facts = _facts(browser, record, {})
    assert "13.3 PeV" in facts and "41,200 p.e." in facts and "through-going track" in facts


def test_camera_follows_the_flight_until_it_is_turned(browser):
    "Then it stays where the user left it."
    def eye(): return browser.figure.layout.scene.camera.eye.to_plotly_json()
    first = eye()
    browser.step(1)
    assert eye() == across_flight(browser.view)["eye"] != first
    browser.figure.layout.scene.camera.eye = dict(x=2, y=0, z=0)
    browser.step(1)
    assert eye() == dict(x=2, y=0, z=0)


def test_stored_output_is_a_picture(browser):
    "For pages without a kernel."
    bundle = browser._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBORw0KGgo")
    assert bundle["text/plain"] == f"EventBrowser at {browser.view.title}" and len(bundle) == 2
