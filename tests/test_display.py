"Displays of events: what they draw is what the pulses say."
import os
import re
import shutil
import time
import zlib

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from iceaggr.data import IceCubeDataset
from iceaggr.display import (
    EventView,
    _ball_sizes,
    _charge_until,
    _hit_doms,
    _hull,
    _pulse_table,
    _rim,
    across_flight,
    display_event,
    energy_text,
    event_title,
    flight_path,
    frame_times,
    make_arrows,
    plot_event,
    save_display,
    three_digits,
)
from iceaggr.geometry import N_SENSORS, load_geometry
from iceaggr.simulation.dataset import demo_dataset
from iceaggr.style import GREY

PULSES = torch.tensor([[90., 0.5, 7, 1], [100, 1, 7, 0], [130, 2, 7, 0],      # early noise, two pulses
                       [110, 4, 8, 0], [400, 9, 8, 1],                         # a pulse, late noise
                       [700, 0.3, 61, 1]])                                     # noise only
COLUMNS = ["time", "charge", "sensor_id", "auxiliary"]


@pytest.fixture(scope="module")
def dataset():
    "Simulated events of the surveyed detector."
    return IceCubeDataset(demo_dataset())


@pytest.fixture(scope="module")
def bright(dataset):
    "The event with the most pulses."
    return dataset[int(dataset.event_table().n_pulses.argmax())]


def traces_by_meta(figure):
    "The traces that have a name of their own."
    return {trace.meta: trace for trace in figure.data if trace.meta is not None}


# From pulses to DOMs

def test_doms_are_described_by_their_proper_pulses():
    "Auxiliary pulses count only where a DOM has no others."
    doms = _hit_doms(PULSES)
    assert doms["first"].tolist() == [100, 110, 700] and doms["last"].tolist() == [130, 110, 700]
    assert np.allclose(doms.charge, [3, 4, 0.3]) and doms.only_auxiliary.tolist() == [False, False, True]
    assert doms.n_pulses.tolist() == [3, 2, 1] and doms.n_auxiliary.tolist() == [1, 1, 1]
    assert np.allclose(doms.auxiliary_charge, [0.5, 9, 0.3])


def test_a_frame_is_as_good_as_an_array():
    "Also with times in nanoseconds since 1970."
    frame = pd.DataFrame(PULSES.numpy().astype(float), columns=COLUMNS).assign(event_id=3)
    assert _hit_doms(frame).equals(_hit_doms(PULSES))
    late = frame.assign(time=frame.time.astype("int64") + 1_764_300_000 * 10 ** 9)
    assert np.array_equal(_pulse_table(late).time, (PULSES[:, 0] - PULSES[:, 0].min()).double())


@pytest.mark.parametrize("bad", [
    PULSES[:0],
    PULSES[:, :3],
    PULSES[:, 0],
    PULSES * torch.tensor([1, 1, 100, 1]),
    PULSES * torch.tensor([1, np.inf, 1, 1]),
    pd.DataFrame({"time": [1.], "charge": [1.]}),
    pd.DataFrame(PULSES.numpy(), columns=COLUMNS).assign(event_id=[1, 1, 1, 1, 1, 2]),
], ids=["none", "3 columns", "1 dimension", "no such sensor", "infinite", "columns missing", "two events"])
def test_wrong_pulses_are_refused(bad):
    "The message starts with what is wrong."
    with pytest.raises(ValueError, match="^pulses:"): _pulse_table(bad)


# What the displays share

def test_arrows_have_errors_and_radii():
    "The radius is that of a narrow von Mises-Fisher distribution."
    arrows = make_arrows((0., 0.), {"run A": (0., 0.5), "run B": (1., 0.2, 30.)})
    assert [a.name for a in arrows] == ["true", "run A", "run B"]
    assert np.allclose([a.error for a in arrows[1:]], [0.5, 0.2])
    assert arrows[1].radius is None
    assert np.isclose(30 * (1 - np.cos(arrows[2].radius)), -np.log(1 - 0.68))


@pytest.mark.parametrize("wrong", [
    dict(truth=(0., float("nan"))),
    dict(truth=(0., 4.)),
    dict(prediction=(1.,)),
    dict(prediction=(1., 1.), kappa=-1),
    dict(prediction={"a": (1., 1., np.nan)}),
])
def test_wrong_directions_are_refused(wrong):
    "Angles and concentrations are checked before anything is drawn."
    for draw in (display_event, plot_event):
        with pytest.raises(ValueError, match="truth:|prediction|predicted:|a: kappa"): draw(PULSES, **wrong)


def test_charge_until_counts_pulse_by_pulse():
    "By hand, and against a loop over random times."
    view = EventView(PULSES, truth=(0., 1.), prediction=(0., 1.5))
    assert _charge_until(view, [0, 100, 120, np.inf]).tolist() == [[0, 0], [1, 0], [1, 4], [3, 4]]
    times = np.sort(np.random.default_rng(0).uniform(0, 800, 9))
    rows = PULSES.tolist()
    slow = [[sum(q for t, q, s, aux in rows if s == sensor and not aux and t <= limit)
             for sensor in view.lit.sensor_id] for limit in times]
    assert np.allclose(_charge_until(view, times), slow)


def test_title_describes_the_event():
    "Size and error; or the given title."
    assert "predicted off by 28.6°" in EventView(PULSES, truth=(0., 1.), prediction=(0., 1.5)).title
    assert EventView(PULSES, title="one").title == "one"


def test_sizes_go_with_the_cube_root_of_the_charge():
    "Up to the largest, down to half a unit."
    assert np.allclose(_ball_sizes(np.array([0., 1., 8.]), 8, 4, 20), [0, 4, 8])
    assert _ball_sizes(1e6, 1e6, 4, 20) == 20 and _ball_sizes(1e-6, 1e6, 4, 20) == 2


def test_paths_end_at_the_box():
    "Up through the detector; from the east, cut off at the wall."
    start, end = flight_path(np.zeros(3), np.array([0., 0, -1]))
    assert end[2] > start[2] and abs(end[2] - start[2] - 1200) < 1e-6
    start, end = flight_path(np.array([500., 0, 0]), np.array([1., 0, 0]))
    assert np.allclose([start, end], [[680, 0, 0], [-100, 0, 0]])


def test_rim_of_a_cone_lies_at_its_angle():
    "And its picture in a plane is a convex hull."
    rim = _rim(np.array([0.6, 0., 0.8]), 0.3)
    assert np.allclose(np.linalg.norm(rim, axis=1), 1)
    assert np.allclose(np.arccos(rim @ [0.6, 0., 0.8]), 0.3)
    square = np.array([[0., 0], [2, 0], [2, 2], [0, 2], [1, 1], [1, 0]])
    assert sorted(map(tuple, _hull(square))) == [(0, 0), (0, 2), (2, 0), (2, 2)]


@pytest.mark.parametrize(("number", "text"), [
    (2.0, "2"), (0.5, "0.5"), (13.31, "13.3"), (999.6, "1,000"), (41_234, "41,200")])
def test_numbers_have_three_digits(number, text):
    "With thousands separated."
    assert three_digits(number) == text


@pytest.mark.parametrize(("energy", "text"), [
    (1.5, "1.5 GeV"), (999.4, "999 GeV"), (999.9, "1 TeV"), (200e3, "200 TeV"), (13.31e6, "13.3 PeV")])
def test_energies_have_a_unit_that_suits(energy, text):
    "No 1,000 GeV."
    assert energy_text(energy) == text


def test_titles_name_what_is_known():
    "And nothing that is not."
    assert event_title("event 7", 30) == event_title("event 7", 30, None, np.nan) == "event 7, 30 pulses"
    assert event_title("Ernie", 9_347, "cascade", 1.1e6, "2012-01-03") == (
        "Ernie, cascade, 1.1 PeV, 2012-01-03, 9,347 pulses")


def test_a_late_outlier_leaves_the_colours_alone():
    "A cascade of 30 DOMs within 300 ns, then one DOM of 1 p.e. 3 microseconds later."
    cascade = [[10_000 + 10 * k, 20., 60 * k, 0] for k in range(30)]
    alone, outlier = (EventView(torch.tensor(cascade + more)) for more in ([], [[13_000, 1., 5000, 0]]))
    assert np.allclose(alone.times, outlier.times, atol=20)
    assert np.ptp(np.clip(alone.lit["first"], *outlier.times)) > 200


@pytest.mark.parametrize("zenith", [0., 0.4, 1.5, 3.])
def test_camera_looks_across_the_flight(zenith):
    "Which passes from left to right; above the horizon, unless the flight is vertical."
    view = EventView(PULSES, truth=(1., zenith))
    eye = np.array(list(across_flight(view)["eye"].values()))
    eye /= np.linalg.norm(eye)
    flight = -view.arrows[0].direction
    assert abs(eye @ flight) < 0.3 and eye[2] > 0
    if zenith: assert np.cross([0, 0, 1], eye) @ flight > 0


def test_camera_without_direction_looks_across_the_light():
    "Along y, early light first."
    xyz = load_geometry().xyz
    row = np.flatnonzero((np.abs(xyz[:, 0]) < 60) & (np.abs(xyz[:, 2]) < 20))
    order = row[np.argsort(xyz[row, 1])]
    pulses = np.stack([np.arange(len(row)) * 300., np.full(len(row), 5.), order, np.zeros(len(row))], 1)
    eye = across_flight(EventView(pulses))["eye"]
    assert len(row) > 5 and eye["x"] > 1.3 and abs(eye["y"]) < 0.4


def test_times_count_from_the_first_light():
    "Auxiliary pulses before it have negative times."
    view = EventView(PULSES, from_first_light=True)
    assert view.lit["first"].tolist() == [0, 10] and view.pulses.time.tolist() == [0, 30, 10]
    assert EventView(PULSES[5:], from_first_light=True).doms["first"].tolist() == [0]
    figure = display_event(view, panels=True)
    assert figure.layout.coloraxis.colorbar.title.text == "first pulse, from first light [ns]"


def luminance(colour):
    "Relative luminance of WCAG 2."
    rgb = np.array(to_rgb(colour))
    return np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92) @ [0.2126, 0.7152, 0.0722]


def contrast(one, other):
    "Contrast ratio of two colours."
    dark, light = sorted([luminance(one), luminance(other)])
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_letters_stand_out_from_the_background(theme):
    "Letters 4.5 : 1, the truth and the dots of the DOMs with them; both kinds of display."
    view = EventView(PULSES, truth=(0., 1.), theme=theme)
    assert contrast(view.theme.ink, view.theme.paper) > 7 and contrast(view.theme.soft, view.theme.paper) > 3
    assert view.arrows[0].colour == view.theme.ink
    figure = plot_event(view)
    figure.canvas.draw()
    for text in figure.findobj(plt.Text): assert contrast(text.get_color(), figure.get_facecolor()) > 4.5
    plt.close(figure)
    page = display_event(view)
    assert contrast(page.layout.template.layout.font.color, page.layout.paper_bgcolor) > 4.5


def test_icecube_colours_run_from_red_to_blue():
    "Early red, late blue; on both displays."
    view = EventView(PULSES, colors="icecube")
    early, late = to_rgb(view.theme.times[0]), to_rgb(view.theme.times[-1])
    assert np.argmax(early) == 0 and np.argmax(late) == 2
    scale = display_event(view).layout.coloraxis.colorscale
    assert [colour for _, colour in scale] == view.theme.times
    for wrong in (dict(colors="jet"), dict(theme="night")):
        with pytest.raises(ValueError, match="choose"): EventView(PULSES, **wrong)


# Interactive displays

def test_frames_hold_the_light_that_has_arrived(dataset, bright):
    "A DOM shows from its first pulse on, the bars hold all charge so far, the last frame is the figure."
    view = EventView(bright, dataset.geometry)
    figure, times = display_event(view, panels=True, animate=True), frame_times(view)
    index = {trace.meta: k for k, trace in enumerate(figure.data)}
    assert len(figure.frames) == len(times) == len(figure.layout.sliders[0].steps)
    assert (np.diff(times) >= 0).all()
    pulses = bright["pulse_features"].numpy()
    for frame, limit in zip(figure.frames, times, strict=True):
        parts = dict(zip(frame.traces, frame.data, strict=True))
        shown = parts[index["light"]].marker.size > 0
        assert (shown == (view.lit["first"] <= limit)).all()
        received = pulses[(pulses[:, 3] == 0) & (pulses[:, 0] <= limit), 1].sum()
        assert np.isclose(parts[index["charge of strings"]].y.sum(), received, rtol=1e-4)
    last, whole = parts, figure.data
    for meta in ("light", "strings lit"):
        assert np.allclose(last[index[meta]].marker.size, whole[index[meta]].marker.size)
    assert np.allclose(last[index["charge of strings"]].y, whole[index["charge of strings"]].y)
    assert np.allclose(last[index["now"]].x, whole[index["now"]].x)


def test_figure_shows_doms_and_directions(dataset, bright):
    "Balls at the places of the lit DOMs; a path per direction, a cone where there is a kappa."
    view = EventView(bright, dataset.geometry, prediction={"A": (1., 1.), "B": (2., 2., 5.)})
    traces = traces_by_meta(display_event(view, panels=True))
    light = np.stack([traces["light"][c] for c in "xyz"], 1)
    assert np.allclose(light, dataset.geometry.xyz[view.lit.sensor_id], atol=1e-3)
    assert {"path true", "path A", "path B", "cone B"} <= set(traces) and "cone A" not in traces


def test_every_dom_is_a_dot_and_the_legend_has_no_time(dataset, bright):
    "Nobody reads a time from a colour in the legend."
    figure = display_event(bright, dataset.geometry)
    dots = np.stack([figure.data[0][c] for c in "xyz"], 1)
    assert np.isfinite(dots).all(1).sum() == N_SENSORS
    listed = [t for t in figure.data if t.type == "scatter3d" and t.showlegend is not False]
    assert all(t.marker.coloraxis is None for t in listed) and "light" in [t.legendgroup for t in listed]
    static = plot_event(bright, dataset.geometry)
    faces = [h.get_markerfacecolor() for h in static.legends[0].legend_handles if h.get_marker() == "o"]
    assert set(faces) <= {"none", GREY}
    plt.close(static)


def test_displays_of_many_pulses_stay_small(dataset, bright):
    "100,000 pulses, and 200,000 that hit every DOM: below 2 MB without plotly's script."
    pulses, rng = bright["pulse_features"], np.random.default_rng(0)
    repeated = pulses.repeat(1 + 100_000 // len(pulses), 1)
    everywhere = np.stack([rng.gamma(2, 800, 200_000) + 10_000, rng.gamma(1, 1, 200_000),
                           np.arange(200_000) % N_SENSORS, rng.random(200_000) < 0.2], 1)
    for many in (repeated, everywhere):
        start = time.perf_counter()
        figure = display_event(many, dataset.geometry, panels=True, animate=True)
        assert len(figure.to_html(include_plotlyjs=False)) < 2_000_000
        assert time.perf_counter() - start < 60


def test_interactive_displays_carry_a_static_picture():
    "For pages that run no JavaScript; a notebook stores both."
    bundle = display_event(PULSES, truth=(0., 1.), animate=True)._repr_mimebundle_()
    assert bundle["image/png"].startswith("iVBORw0KGgo")
    assert plt.get_fignums() == []


@pytest.mark.parametrize("pulses", [PULSES[:1], PULSES[5:]], ids=["one pulse", "auxiliary pulses only"])
def test_events_of_one_pulse_are_drawn(pulses):
    "All parts of both displays."
    what = dict(truth=(0., 0.), prediction=(3., 3.), kappa=0.1)
    assert len(display_event(pulses, **what, panels=True, animate=True).data) >= 5
    plt.close(plot_event(pulses, **what))


# Static displays

def overlapping(figure):
    "Pairs of texts whose boxes overlap; ticks beyond the ends of an axis are not drawn."
    figure.canvas.draw()
    hidden = []
    for ax in figure.findobj(plt.Axes):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = axis.get_view_interval()
            labels = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            hidden += [label for place, label in labels if not low <= place <= high]
    boxes = []
    for text in figure.findobj(plt.Text):
        if not text.get_visible() or not text.get_text().strip() or text in hidden: continue
        box = text.get_window_extent()
        if box.width > 0 and figure.bbox.contains(box.x0 + box.width / 2, box.y0 + box.height / 2):
            boxes.append((text.get_text(), box))
    return [(one, other) for k, (one, a) in enumerate(boxes) for other, b in boxes[:k]
            if a.shrunk(0.98, 0.98).overlaps(b)]


@pytest.mark.parametrize("n_pulses", [30, 100, 10_000])
def test_no_two_labels_overlap(dataset, n_pulses):
    "Judged by the boxes of all texts, with two predictions in the legend."
    index = int((dataset.event_table().n_pulses - n_pulses).abs().argmin())
    predictions = {"run A": (0.5, 1.0, 20.), "run B": (1., 2., 5.)}
    figure = plot_event(dataset[index], dataset.geometry, prediction=predictions)
    assert not overlapping(figure)
    plt.close(figure)


@pytest.mark.parametrize("style", ["default", "iceaggr.figures"])
def test_plots_leave_the_settings_of_matplotlib_alone(style, tmp_path):
    "Neither drawing nor saving changes them; given axes are drawn into."
    with plt.style.context(style):
        before, interactive = dict(plt.rcParams), plt.isinteractive()
        figure = plot_event(PULSES, truth=(0., 1.))
        save_display(figure, tmp_path / "event.pdf")
        plt.close(figure)
        axes = plt.subplots(1, 3)[1]
        assert plot_event(PULSES.numpy(), axes=axes) is axes[0].figure
        plt.close(axes[0].figure)
        assert dict(plt.rcParams) == before and plt.isinteractive() == interactive


# Files

def pdf_text(path):
    "A PDF with its compressed streams unpacked."
    data = path.read_bytes()
    streams = re.findall(rb"stream\r?\n(.*?)endstream", data, re.S)
    return data + b"".join(zlib.decompressobj().decompress(s) for s in streams if s[:1] == b"x")


def test_static_files_hold_lines_and_letters(tmp_path):
    "No pixel image; fonts as TrueType in a PDF, as text in an SVG."
    figure = plot_event(PULSES, truth=(0., 1.), prediction=(1., 2.), kappa=10)
    pdf = pdf_text(save_display(figure, tmp_path / "event.pdf"))
    assert pdf.startswith(b"%PDF") and b"/Subtype /Image" not in pdf
    assert b"CIDFontType2" in pdf and b"/Type3" not in pdf
    svg = save_display(figure, tmp_path / "event.svg").read_text()
    assert "<image" not in svg and "first pulse [ns]" in svg
    with pytest.raises(ValueError, match=r"\.pdf"): save_display(figure, tmp_path / "event.html")
    plt.close(figure)


def test_interactive_file_needs_no_network(tmp_path):
    "One copy of plotly inside, the title escaped, nothing left next to it."
    figure = display_event(PULSES, truth=(0., 1.), panels=True, animate=True)
    path = save_display(figure, tmp_path / "new/event.html", title="A < B")
    page = path.read_text()
    assert [f.name for f in path.parent.iterdir()] == ["event.html"]
    assert "<title>A &lt; B</title>" in page
    assert sum("plotly.js v" in part for part in page.split("<script")) == 1
    assert 'src="http' not in page and 'href="http' not in page.split("<body>")[0]
    with pytest.raises(ValueError, match=r"\.html"): save_display(figure, tmp_path / "event.pdf")


def test_script_beside_the_pages(tmp_path):
    "Written once; the pages link to it, and an other version is replaced."
    figure, script = display_event(PULSES), tmp_path / "plotly.min.js"
    script.write_text("old")
    pages = [save_display(figure, tmp_path / name, plotly="beside") for name in ("a.html", "b.html")]
    assert script.stat().st_size > 1_000_000 and sorted(tmp_path.iterdir()) == [*pages, script]
    for page in pages:
        assert page.stat().st_size < 400_000
        assert re.findall('src="([^"]*)"', page.read_text()) == ["plotly.min.js"]
    with pytest.raises(ValueError, match="beside"): save_display(figure, pages[0], plotly="cdn")


def test_pages_fit_a_telephone(tmp_path):
    "No text or scene beyond a window of 400 px; in a wide one all in one screen."
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    sync_api = pytest.importorskip("playwright.sync_api", reason="install playwright")
    if not chromium: pytest.skip("install Chromium")
    title = "Kloppo, through-going muon track, 2.6 PeV deposited, 2014-06-11, 15,039 pulses"
    figure = display_event(PULSES, truth=(0., 1.), panels=True, animate=True, title=title)
    page = save_display(figure, tmp_path / "event.html")
    root = ["--no-sandbox"] if hasattr(os, "getuid") and os.getuid() == 0 else []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--disable-gpu", *root])
        tab = browser.new_context(viewport=dict(width=400, height=850), is_mobile=True).new_page()
        tab.goto(page.as_uri())
        scene = "document.querySelector('.plotly-graph-div')._fullLayout.scene.domain.x[1]"
        tab.wait_for_function(f"{scene} === 1")
        assert tab.evaluate("document.documentElement.scrollWidth") == 400
        right = "t => t.getBoundingClientRect().right"
        ends = tab.evaluate(f"[...document.querySelectorAll('text')].map({right})")
        assert len(ends) > 20 and max(ends) <= 400
        tab.set_viewport_size(dict(width=1400, height=900))
        tab.wait_for_function(f"{scene} === 0.6")
        assert tab.evaluate("[document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
                            ) == [1400, 900]
        browser.close()


def test_dollars_in_a_title_are_text(bright):
    "The name of an event's type may hold what matplotlib would read as a formula."
    figure = plot_event(bright, title="a $\\frac{ and $x$")
    figure.canvas.draw()
    plt.close(figure)
