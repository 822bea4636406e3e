"The detector: nominal and surveyed positions, tables read or refused, sensors found by position."
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from iceaggr.geometry import (
    DUST_LAYER,
    N_SENSORS,
    ORIGIN_DEPTH,
    Geometry,
    default_efficiency,
    ice_optics,
    load_geometry,
    plot_detector_3d,
    sensors_at,
)


@pytest.fixture(scope="module")
def detector():
    "The nominal detector."
    return Geometry.nominal()


@pytest.fixture
def kaggle_table(detector, tmp_path):
    "The nominal detector in Kaggle's layout."
    detector.to_csv(tmp_path / "sensor_geometry.csv")
    return pd.read_csv(tmp_path / "sensor_geometry.csv")


@pytest.fixture
def graphnet_table(detector):
    "The nominal detector, shifted, in GraphNeT's layout, with one IceTop sensor in the first row."
    table = pd.DataFrame(detector.xyz + [3.0, -2.0, 1.0], columns=["dom_x", "dom_y", "dom_z"])
    table["string"], table["dom_number"] = detector.string + 1, detector.dom + 1
    table["rde"] = default_efficiency()
    icetop = table[:1].assign(dom_number=61, dom_z=1948.0)
    return pd.concat([icetop, table], ignore_index=True)


def test_nominal_detector_has_the_properties_of_the_design(detector):
    "A cubic kilometre around the origin that ends at 2,450 m; DeepCore leaves the dust layer free."
    assert len(detector) == N_SENSORS and detector.xyz.shape == (N_SENSORS, 3)
    assert abs(detector.xyz[:, :2].mean(0)).max() < 10
    assert np.isclose((ORIGIN_DEPTH - detector.xyz[:, 2]).max(), 2450)
    depth = ORIGIN_DEPTH - detector.xyz[detector.is_deepcore, 2]
    assert not ((depth > DUST_LAYER[0]) & (depth < DUST_LAYER[1])).any()


def test_survey_is_the_default():
    "Where no geometry is named, and with the positions of the pretrained models."
    from iceaggr.display import EventView
    from iceaggr.event_transformer import EventTransformer
    survey = Geometry.icecube86()
    for found in (load_geometry(), load_geometry("small"), EventView(np.ones((1, 4))).geometry):
        assert np.allclose(found.xyz, survey.xyz, atol=1e-4)
        assert np.allclose(found.efficiency, survey.efficiency)
    sensors = EventTransformer(32, 2, 1).sensors.numpy()
    assert np.allclose(sensors[:, :3], survey.xyz, atol=1e-4)
    assert np.array_equal(survey.xyz, survey.xyz.round(2)) and survey.xyz is not Geometry.icecube86().xyz


def test_neighbours_stay_on_their_string(detector):
    "Three are missing at either end of a string."
    near = detector.neighbours(2)
    assert near[[0, 5, 59]].tolist() == [[-1, 1, -1, 2], [4, 6, 3, 7], [58, -1, 57, -1]]
    assert ((near < 0) | (detector.string[near] == detector.string[:, None])).all()
    assert (near == -1).sum() == 86 * 6


def test_csv_is_read_in_any_order_of_rows(detector, kaggle_table, tmp_path):
    "A folder or a file, rows shuffled."
    assert kaggle_table.columns.tolist() == ["sensor_id", "x", "y", "z"]
    path = tmp_path / "sensor_geometry.csv"
    kaggle_table.sample(frac=1, random_state=0).to_csv(path, index=False)
    for place in (tmp_path, path, str(path)):
        assert np.allclose(load_geometry(place).xyz, detector.xyz, atol=1e-6)


def test_efficiencies_survive_a_csv(detector, tmp_path):
    "A dead DOM stays dead."
    efficiency = default_efficiency()
    efficiency[100] = 0
    Geometry(detector.xyz, efficiency).to_csv(tmp_path / "g.csv")
    assert np.array_equal(load_geometry(tmp_path / "g.csv").efficiency, efficiency)


BROKEN = {
    "column missing": (lambda t: t.drop(columns="z"), "column z missing"),
    "sensors missing": (lambda t: t.drop(index=[7, 8]), "sensor_id: 7, 8 missing"),
    "sensor duplicated": (lambda t: pd.concat([t, t[12:13]]), "sensor_id: 12 given more than once"),
    "not a number": (lambda t: t.assign(y=t.y.where(t.sensor_id != 3)), "column y is not a .* in row 3"),
    "one string": (lambda t: t[:60], "missing; give all 5160"),
    "counted from 1": (lambda t: t.assign(sensor_id=t.sensor_id + 1), "whole numbers from 0 to 5159"),
    "negative": (lambda t: t.assign(efficiency=1 - 2 * (t.sensor_id == 4)), "column efficiency is negative"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_csv_is_refused(case, kaggle_table, tmp_path):
    "The error names the file, the column, and the rows or sensors."
    spoil, message = BROKEN[case]
    spoil(kaggle_table).to_csv(tmp_path / "sensor_geometry.csv", index=False)
    with pytest.raises(ValueError, match=message) as error: load_geometry(tmp_path)
    assert "sensor_geometry.csv" in str(error.value)


def test_what_is_not_a_geometry_is_refused(tmp_path):
    "Missing files, other formats, damaged files."
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(ValueError, match="no such file"): load_geometry(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no weights"): load_geometry(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="not a geometry"): load_geometry(tmp_path / "detector.txt")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not a readable parquet"): load_geometry(tmp_path / "bad.parquet")
    (tmp_path / "bad.csv").write_text("")
    with pytest.raises(ValueError, match="comma-separated"): load_geometry(tmp_path / "bad.csv")
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="not a model"): load_geometry(tmp_path / "bad.safetensors")


def test_graphnet_table_gets_its_dead_doms_back(detector, graphnet_table, tmp_path):
    "IceTop is dropped; DOMs left out come back in place, with efficiency 0."
    missing = [130, 78 * 60 + 10]                      # the second is the first DOM below DeepCore's gap
    graphnet_table.drop(index=[1 + m for m in missing]).to_parquet(tmp_path / "icecube86.parquet")
    read = load_geometry(tmp_path / "icecube86.parquet")
    assert np.allclose(read.xyz, detector.xyz + [3.0, -2.0, 1.0])
    assert np.flatnonzero(read.efficiency == 0).tolist() == missing


@pytest.mark.parametrize(("column", "value"), [("rde", -1), ("dom_x", np.nan)])
def test_wrong_graphnet_table_is_refused(column, value, graphnet_table, tmp_path):
    "The row is the file's, IceTop's rows counted."
    graphnet_table[column] = graphnet_table[column].where(graphnet_table.index != 8, value)
    graphnet_table.to_parquet(tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match=f"wrong.parquet: column {column} is .* in row 8 "):
        load_geometry(tmp_path / "wrong.parquet")


def test_graphnet_table_with_duplicates_or_without_a_string_is_refused(graphnet_table, tmp_path):
    "Each DOM once, each string with at least one DOM."
    path = tmp_path / "wrong.parquet"
    pd.concat([graphnet_table, graphnet_table[5:6]]).to_parquet(path)
    with pytest.raises(ValueError, match="duplicated"): load_geometry(path)
    graphnet_table[graphnet_table.string != 7].to_parquet(path)
    with pytest.raises(ValueError, match="no DOM of string 7"): load_geometry(path)


def test_arrays_of_a_geometry_are_checked(detector):
    "Shapes and finite numbers."
    with pytest.raises(ValueError, match="shape"): Geometry(detector.xyz[:60])
    with pytest.raises(ValueError, match="finite"): Geometry(detector.xyz * np.nan)
    with pytest.raises(ValueError, match="not negative"): Geometry(detector.xyz, -default_efficiency())


def test_sensors_are_found_by_their_position(detector):
    "Within a metre, repeated or not; none for no position."
    chosen = np.random.default_rng(0).integers(0, N_SENSORS, 2_000)
    assert np.array_equal(sensors_at(detector.xyz[chosen] + [0.3, -0.2, 0.4], detector), chosen)
    assert len(sensors_at(np.empty((0, 3)), detector)) == 0
    with pytest.raises(ValueError, match="in metres"): sensors_at(detector.xyz[:3] * 1000, detector)
    with pytest.raises(ValueError, match="finite"): sensors_at([[0, 0, np.nan]], detector)


def test_ice_has_the_ranges_of_its_model():
    "A guard against typing errors: medians, depth of the worst ice, end values outside the table."
    depth = 1398.4 + 10 * np.arange(110)
    scattering, absorption = ice_optics(ORIGIN_DEPTH - depth)
    for length in (scattering, absorption): assert DUST_LAYER[0] < depth[length.argmin()] < DUST_LAYER[1]
    assert abs(np.median(scattering) - 32) < 1 and abs(np.median(absorption) - 112) < 1
    assert ice_optics(5000.)[0] == scattering[0] and ice_optics(-5000.)[1] == absorption[-1]
    assert ice_optics(np.zeros((2, 3)))[0].shape == (2, 3)


def test_interactive_figure_carries_a_picture(detector):
    "It is small, and leaves no figure open."
    figures, figure = plt.get_fignums(), plot_detector_3d(detector)
    assert "image/png" in figure._repr_mimebundle_() and len(figure.to_json()) < 200_000
    assert plt.get_fignums() == figures
