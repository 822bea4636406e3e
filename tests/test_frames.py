"""Frames of pulses: which pulses are one event, in which unit they are, and what their flag means."""
import re

import numpy as np
import pandas as pd
import pytest

from iceaggr.io.frames import frame_to_events
from iceaggr.model import HierarchicalTransformer
from iceaggr.pulses import count_times, exact_ids
from iceaggr.simulation.dataset import simulate_events


@pytest.fixture(scope="module")
def model(): return HierarchicalTransformer.from_pretrained("small")


@pytest.fixture(scope="module")
def pulses(): return simulate_events(6, seed=2)[0]


@pytest.fixture(scope="module")
def two_runs(pulses):
    "Six events, numbered 1 to 3 in each of two runs."
    number = pd.factorize(pulses.event_id)[0]
    return pulses.assign(run_id=np.where(number < 3, 7, 8), event_id=1 + number % 3)


# Which pulses are one event

def values(table): return table[["azimuth", "zenith", "kappa"]].to_numpy()


@pytest.mark.parametrize("shape", [
    lambda t: t,
    lambda t: t.set_index(["run_id", "event_id"]),
    lambda t: t.set_index("event_id"),
    lambda t: t.rename(columns=dict(run_id="RunID")),
    lambda t: t.assign(run_id="run " + t.run_id.astype(str)),
    lambda t: pd.concat({n: part.set_index("event_id").drop(columns="run_id")
                         for n, part in t.groupby("run_id")}),
    lambda t: t.rename(columns=dict(run_id="campaign")).set_index(["campaign", "event_id"])])
def test_runs_that_number_their_events_alike_are_kept_apart(model, pulses, two_runs, shape):
    "Every level of the key comes back."
    found = model.predict(shape(two_runs))
    assert np.array_equal(values(found), values(model.predict(pulses)))
    assert found.event_id.tolist() == [1, 2, 3, 1, 2, 3]
    assert len(found.columns) == 6
    assert sorted(found.iloc[:, k].nunique() for k in (0, 1)) == [2, 3]


def test_sub_events_are_events(model, pulses):
    number = pd.factorize(pulses.event_id)[0]
    found = model.predict(pulses.assign(event_id=number // 2, sub_event_id=number % 2))
    assert found.columns.tolist()[:2] == ["event_id", "sub_event_id"]
    assert found.sub_event_id.tolist() == [0, 1] * 3


def test_errors_name_the_whole_key(two_runs):
    with pytest.raises(ValueError, match="column charge, event event_id 1, run_id 7: '-1.0'"):
        frame_to_events(two_runs.assign(charge=-1.0))
    with pytest.raises(ValueError, match="column run_id: missing in some rows"):
        frame_to_events(two_runs.assign(run_id=np.nan))


@pytest.mark.parametrize("ids", [
    np.array([2.0 ** 53]), np.array([2.0 ** 24], np.float32), pd.Series([7, 2.0 ** 60], dtype=object),
    pd.Series([2.0 ** 53], dtype="Float64"), pd.Series([str(2 ** 60 + 1), "7.0"])])
def test_ids_that_lost_digits_are_refused(ids):
    message = "column event_no: .* read the ids as int64"
    with pytest.raises(ValueError, match=message): exact_ids(ids, "event_no")


def test_ids_of_any_type():
    "Whole numbers of 64 bits are kept, whatever holds them."
    large = 2 ** 63 - 1
    for ids in ([large], [str(large)], np.array([large], np.uint64), pd.Series([large], dtype="Int64")):
        assert exact_ids(ids).tolist() == [large]
    assert exact_ids([-2 ** 63, 3]).tolist() == [-2 ** 63, 3]
    assert exact_ids(np.array([2 ** 24 - 1], np.float32)).tolist() == [2 ** 24 - 1]
    for wrong in (["a"], [0.5], np.array([2 ** 63], np.uint64), [np.inf]):
        with pytest.raises(ValueError, match="is not a whole number of 64 bits"): exact_ids(wrong)


def test_repeated_pulses_are_counted(pulses):
    "One joined table too many, or an eighth of a table twice."
    with pytest.warns(UserWarning, match=rf"{len(pulses):,} of {2 * len(pulses):,} pulses repeat") as caught:
        frame_to_events(pd.concat([pulses, pulses]))
    assert caught[0].filename == __file__


# Units

@pytest.mark.filterwarnings("error")
def test_usual_units_pass(pulses):
    frame_to_events(pulses)
    for _, event in pulses.groupby("event_id"): frame_to_events(event)


@pytest.mark.parametrize("factor", [10, 1e3, 1e-9, 0.1])
def test_wrong_units_of_time_are_doubted(pulses, factor):
    with pytest.warns(UserWarning, match=re.escape(f"multiply the times by {1 / factor:g}")):
        frame_to_events(pulses.assign(time=pulses.time * factor))


def test_real_events_spread_at_the_speed_of_light(ppc_root):
    "The check does not depend on the simulation, and holds for each of 500 events alone."
    from iceaggr.data import IceCubeDataset
    from iceaggr.io.frames import _spread_speed
    ds = IceCubeDataset(ppc_root, batch_ids=[4], max_events=500)
    pulses = [ds[i]["pulse_features"].numpy() for i in range(len(ds))]
    speed = np.array([_spread_speed(event, ds.geometry.xyz) for event in pulses])
    speed = speed[np.isfinite(speed)]
    assert speed.min() > 0.1 and speed.max() < 1 and 0.2 < np.median(speed) < 0.3


def test_times_in_float32_that_lost_nanoseconds():
    late = np.array([2 ** 24 + 3_000, 2 ** 24 + 3_100])
    with pytest.raises(ValueError, match="as float32, .* known to 2 ns"): count_times(late.astype(np.float32))
    assert count_times(late.astype(np.float64)).tolist() == [0, 100]


# Flags and shapes

@pytest.mark.parametrize("name, flag", [
    ("hlc", 'pulses["hlc"] != 1'), ("aux", 'pulses["aux"]'), ("Auxiliary", 'pulses["Auxiliary"]')])
def test_flags_of_another_name_are_refused(pulses, name, flag):
    "With the call that makes the column."
    values = (pulses.auxiliary != (name == "hlc")).astype(int)
    other = pulses.assign(**{name: values}).drop(columns="auxiliary")
    with pytest.raises(ValueError, match="has .* but no auxiliary") as error: frame_to_events(other)
    assert f"pulses.assign(auxiliary={flag})" in str(error.value)
    made = other.assign(auxiliary=eval(flag, dict(pulses=other)))
    for a, b in zip(frame_to_events(made), frame_to_events(pulses), strict=True):
        assert a["pulse_features"].equal(b["pulse_features"])


def test_one_row_per_event(pulses):
    "Notebooks of the competition keep a list per column."
    lists = pulses.groupby("event_id", sort=False).agg(list)
    for table in (lists, lists.reset_index(), lists.map(np.array)):
        for a, b in zip(frame_to_events(table), frame_to_events(pulses), strict=True):
            assert a["pulse_features"].equal(b["pulse_features"]) and a["event_id"] == b["event_id"]
    lists.at[lists.index[1], "charge"] = [1.0]
    with pytest.raises(ValueError, match="lists of .* have different lengths"): frame_to_events(lists)
