"""i3 files: GraphNeT's files give the events of its tables; each class is read back; damage is named."""
import bz2
import gzip
import os
import sqlite3
import struct
import sys
from contextlib import closing
from pathlib import Path

import i3_files as i3
import numpy as np
import pandas as pd
import pytest

from iceaggr.common import DataError
from iceaggr.geometry import Geometry
from iceaggr.io.frames import frame_to_events
from iceaggr.io.i3 import _crc32c, i3_events, i3_frames, i3_geometry, read_i3

GENIE, UPGRADE = "oscNext_genie_level7_v02_first_5_frames", "upgrade_genie_step4_140028_000998_first_5_frames"
TRUTH = ["azimuth", "zenith", "energy", "position_x", "position_y", "position_z", "pid", "interaction_type"]
SERIES = {(1, 5, 0): [(10., 1., 2., 1), (14., 0.5, 2., 0)], (86, 60, 0): [(7.5, 2., 1., 7)]}


@pytest.fixture(scope="session")
def graphnet():
    "Folder of GraphNeT's test files."
    default = Path(__file__).parents[2] / "shared/data/graphnet"
    folder = Path(os.environ.get("ICEAGGR_GRAPHNET", default))
    if not folder.is_dir(): pytest.skip("ICEAGGR_GRAPHNET names no folder: no files of GraphNeT to test on")
    return folder


def table(folder, name, sql):
    with closing(sqlite3.connect(folder / f"{name}.db")) as db: return pd.read_sql(sql, db)


def read(folder, name, *args, **kwargs): return read_i3(folder / "i3" / f"{name}.i3.gz", *args, **kwargs)


def sort(pulses): return pulses.sort_values(["event_id", "sensor_id", "time", "charge"], ignore_index=True)


def as_ours(pulses):
    "GraphNeT's table in our columns."
    sensor = 60 * (pulses.string - 1) + pulses.dom_number - 1
    return pd.DataFrame(dict(event_id=pulses.event_no, sensor_id=sensor, time=pulses.dom_time,
                             charge=pulses.charge, auxiliary=pulses.hlc == 0))


def check_table(folder, name, pulsemap, known, **kwargs):
    "The pulses and truth of an i3 file equal those of the SQLite table, bit by bit."
    pulses, truth = read(folder, name, pulsemap, **kwargs)
    expected = table(folder, name, f"SELECT * FROM {pulsemap}")
    expected = sort(as_ours(expected[known(expected)]))
    assert len(expected) and truth.event_id.tolist() == list(range(5))
    pd.testing.assert_frame_equal(sort(pulses)[expected.columns], expected, check_dtype=False, rtol=0)
    labels = table(folder, name, "SELECT * FROM truth ORDER BY event_no")
    pd.testing.assert_frame_equal(truth[TRUTH].astype(float), labels[TRUTH], rtol=0, atol=0)
    ours, theirs = ["run_id", "sub_run", "event", "sub_event"], ["RunID", "SubrunID", "EventID", "SubEventID"]
    assert np.array_equal(truth[ours], labels[theirs])
    return pulses, truth, labels


def test_pulses_and_truth_equal_graphnets_table(graphnet):
    pulses, truth, labels = check_table(graphnet, GENIE, "SRTInIcePulses", lambda t: t.string <= 86)
    assert len(pulses) == 56 and pulses.auxiliary.any() and not pulses.auxiliary.all()
    year = truth.start_time.dt.year.astype(str).astype("datetime64[ns]")
    tenths = (truth.start_time - year).astype("timedelta64[ns]").astype("int64") * 10
    assert np.abs(tenths - labels.event_time).max() <= 16     # the table holds float64
    assert (truth.end_time > truth.start_time).all()


def test_doms_are_those_at_graphnets_positions(graphnet):
    expected = table(graphnet, GENIE, "SELECT * FROM SRTInIcePulses")
    sensor = as_ours(expected).sensor_id.astype(int)
    nominal = Geometry.nominal().xyz[sensor]
    assert np.linalg.norm(nominal - expected[["dom_x", "dom_y", "dom_z"]], axis=1).max() < 35


def test_upgrade_needs_a_choice_and_keeps_the_known_doms(graphnet):
    with pytest.raises(DataError, match=r"modules beyond IceCube-86 .*only_known_doms=True"):
        read(graphnet, UPGRADE, "SplitInIcePulses")
    with pytest.warns(UserWarning, match="498 pulses on modules beyond IceCube-86 left out"):
        pulses, _, _ = check_table(graphnet, UPGRADE, "SplitInIcePulses", lambda t: t.string <= 86,
                                   only_known_doms=True)
    assert len(pulses) == 625 - 498


def test_muons_and_noise(graphnet):
    pulses, truth = read(graphnet, "oscNext_muongun_level7_v02_first_5_frames")
    assert len(truth) == 5 and (truth.pid.abs() == 13).all() and pulses.event_id.nunique() == 5
    with pytest.warns(UserWarning, match="no physics frames"):
        pulses, truth = read(graphnet, "oscNext_noise_level7_v02_first_5_frames")
    assert len(pulses) == len(truth) == 0 and "auxiliary" in pulses


def test_every_known_object_of_graphnets_files_is_decoded(graphnet):
    for path in (graphnet / "i3").iterdir():
        for frame in i3_frames(path, "GCDQPS"):
            for key in frame:
                try: frame[key]
                except DataError as error: assert "is not decoded by this package" in str(error)


def test_pulses_are_taken_by_the_model(graphnet):
    pulses, truth = read(graphnet, GENIE)
    events = frame_to_events(pulses)
    assert [int(e["event_id"]) for e in events] == truth.event_id.tolist()


# Files written here.

def write(path, *frames):
    path.write_bytes(b"".join(frames))
    return path


def physics(**objects): return i3.frame("P", {"I3EventHeader": i3.header(), **objects})


def pulses_of(path, key):
    "(string, module) -> list of (time, charge) of the first event."
    found = next(i3_frames(path)).pulses(key)
    ends = np.cumsum(found.count)
    return {tuple(k[:2]): [(p["time"], p["charge"]) for p in found.pulse[end - n:end]]
            for k, n, end in zip(found.key.tolist(), found.count, ends, strict=True)}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("key_version", [0, 1, 2])
def test_pulse_maps_of_all_versions(tmp_path, version, tracked, key_version):
    path = write(tmp_path / "a.i3", physics(Pulses=i3.pulse_map(SERIES, version, tracked, key_version)))
    pulses, truth = read_i3(path, "Pulses")
    assert pulses.sensor_id.tolist() == [4, 4, 5159] and pulses.time.tolist() == [10, 14, 7.5]
    assert pulses.charge.tolist() == [1, 0.5, 2] and pulses.auxiliary.tolist() == [False, True, False]
    assert truth.azimuth.isna().all() and truth.pid.isna().all()


def random_readouts(rng, n, most=6):
    "Read-outs by time, some with long gaps and large charges, some of IceTop."
    start, readouts = np.sort(rng.integers(0, 40_000, n)), []
    start[-1] += 200_000     # its time takes four more words
    for t in start.tolist():
        top = rng.random() < 0.1
        k = 1 if top else int(rng.integers(1, most))
        steps = np.append(0, rng.choice([1, 3, 40, 254, 255, 256, 300, 65_789, 70_000], k - 1))
        charge = rng.choice([0, 5, 62, 63, 64, 500, 65_598, 70_000, 200_000], k)
        if top: charge = rng.integers(0, 2**14, k)
        columns = t + np.cumsum(steps), charge, rng.integers(0, 9, k)
        stamps = list(zip(*(c.tolist() for c in columns), strict=True))
        module = int(rng.integers(61, 65) if top else rng.integers(1, 61))
        readouts.append((int(rng.integers(1, 79)), module, int(rng.random() < 0.5), stamps))
    return readouts


@pytest.mark.parametrize("n", [0, 1, 2, 50, 400])
def test_super_dst_gives_back_its_stamps(tmp_path, n):
    readouts = random_readouts(np.random.default_rng(n), n) if n else []
    path = write(tmp_path / "a.i3", physics(I3SuperDST=i3.super_dst(readouts)))
    found = next(i3_frames(path)).pulses("I3SuperDST")
    key, pulse = np.repeat(found.key, found.count, axis=0), found.pulse
    expected = sorted((s, m, t - 512., np.float32(10 ** (q * 9 / 16_383 - 2) if m > 60 else 0.05 * q + 0.025),
                       bool(hlc)) for s, m, hlc, stamps in readouts for t, q, _ in stamps)
    rows = zip(key.tolist(), pulse.tolist(), strict=True)
    got = sorted((s, m, t, q, bool(f & 1)) for (s, m, _), (t, q, _, f) in rows)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a[:2] == b[:2] and a[4] == b[4] and a[3] == pytest.approx(b[3], rel=1e-6)
        assert abs(a[2] - b[2]) < 256     # pulses at one time move apart
    assert n == 0 or np.mean([a[2] == b[2] for a, b in zip(got, expected, strict=True)]) > 0.9


def test_widths_end_where_the_next_pulse_begins_and_pulses_at_one_time_share(tmp_path):
    stamps = [(600, 9, 3), (604, 9, 3), (604, 9, 2), (607, 9, 1)]
    path = write(tmp_path / "a.i3", physics(I3SuperDST=i3.super_dst([(5, 6, 1, stamps)])))
    pulse = next(i3_frames(path)).pulses("I3SuperDST").pulse
    assert pulse["time"].tolist() == [88, 90, 92, 95] and pulse["width"].tolist() == [2, 2, 3, 2]


def test_masks_and_unions_nested(tmp_path):
    readouts = [(1, 5, 1, [(600, 19, 3), (700, 19, 3), (800, 39, 3)]), (2, 6, 0, [(650, 19, 3)]),
                (3, 7, 0, [(660, 19, 3)])]
    q = i3.frame("Q", {"I3SuperDST": i3.super_dst(readouts)})
    p = physics(Split=i3.mask("I3SuperDST", [1, 0, 1], [[1, 0, 1], [1]]),
                Clean=i3.mask("Split", [1, 0], [[0, 1]]),
                None_=i3.mask("Split", [1, 1], [[0, 0], [1]], 1),
                Empty=i3.mask("Split", [1, 1], [], 0),
                Map=i3.pulse_map({(3, 7, 0): [(9., 1., 1., 0)], (4, 1, 0): []}),
                All=i3.union("Map", "Clean", "None_"))
    path = write(tmp_path / "a.i3", q, p)
    assert pulses_of(path, "Split") == {(1, 5): [(88, pytest.approx(0.975)), (288, pytest.approx(1.975))],
                                        (3, 7): [(148, pytest.approx(0.975))]}
    assert pulses_of(path, "Clean") == {(1, 5): [(288, pytest.approx(1.975))]}
    assert [*pulses_of(path, "None_")] == [(3, 7)] and pulses_of(path, "Empty") == {}
    joined = pulses_of(path, "All")
    assert [t for t, _ in joined[3, 7]] == [9, 148] and joined[4, 1] == [] and len(joined[1, 5]) == 1


@pytest.mark.parametrize("version", range(4))
def test_headers_of_all_versions(tmp_path, version):
    data = i3.header(3, 4, 5, "Split", (2014, 10**16 + 7), version)
    found = next(i3_frames(write(tmp_path / "a.i3", i3.frame("P", {"I3EventHeader": data}))))["I3EventHeader"]
    assert found["start_time"] == found["end_time"] == np.datetime64("2014-01-12T13:46:40", "ns")
    assert found["run_id"] == 3 and found["event"] == 4 and found["sub_run"] == (7 if version else 0)
    assert (found["sub_event"], found["stream"]) == ((5, "Split") if version == 3 else (0, ""))


JULY = 182 * 86_400 * 10**10     # tenths of ns in the first half of 2012, without the leap second at its end


@pytest.mark.parametrize(("start", "utc"), [
    ((2012, JULY - 10), "2012-06-30T23:59:59.999999999"), ((2012, JULY + 10**10), "2012-07-01"),
    ((2012, 366 * 86_400 * 10**10), "2012-12-31T23:59:59"), ((2011, JULY), "2011-07-02"),
    ((2016, 366 * 86_400 * 10**10), "2017-01-01"), ((2015, JULY), "2015-07-01T23:59:59")])
def test_leap_seconds(tmp_path, start, utc):
    path = write(tmp_path / "a.i3", i3.frame("P", {"I3EventHeader": i3.header(start=start)}))
    assert next(i3_frames(path))["I3EventHeader"]["start_time"] == np.datetime64(utc, "ns")


TREE = [(14, 9., [(13, 5., [(11, 1., []), (22, 2., [])]), (-2000001006, 4., [])]), (12, 3., [])]


@pytest.mark.parametrize("version", [0, 1])
def test_trees_of_both_serialisations(tmp_path, version):
    path = write(tmp_path / "a.i3", physics(I3MCTree=i3.tree(TREE, version), None_=i3.tree([], version)))
    frame = next(i3_frames(path))
    particles, parent = frame["I3MCTree"]
    assert particles["pid"].tolist() == [14, 13, 11, 22, -2000001006, 12]
    assert particles["energy"].tolist() == [9, 5, 1, 2, 4, 3] and parent.tolist() == [-1, 0, 1, 1, 0, -1]
    assert particles["position"].tolist() == [[1, 2, 3]] * 6 and particles["zenith"].tolist() == [0.5] * 6
    assert len(frame["None_"].particles) == 0


@pytest.mark.parametrize("n", [30, 31, 32, 33, 200])
def test_tree_of_several_parts(tmp_path, monkeypatch, n):
    monkeypatch.setattr("iceaggr.io.i3._BITS", 63)     # 65,535 in files
    data = i3.tree([(14, 1., [(11, float(k), []) for k in range(n)])], most=63)
    particles, parent = next(i3_frames(write(tmp_path / "a.i3", physics(I3MCTree=data))))["I3MCTree"]
    assert particles["energy"][1:].tolist() == list(range(n)) and (parent[1:] == 0).all()


@pytest.mark.parametrize(("version", "code", "pid"), [(5, -14, -14), (3, 69, -14), (3, 5626, 1000260560),
                                                      (2, 205, -14), (2, 777, 0)])
def test_particles_of_all_versions(tmp_path, version, code, pid):
    weights = i3.mapping("I3MapStringDouble", "d", {"InteractionType": 2})
    path = write(tmp_path / "a.i3", physics(MCInIcePrimary=i3.particle(code, 7., version),
                                            I3MCWeightDict=weights, Pulses=i3.pulse_map(SERIES)))
    (header, pulses, truth), = i3_events(path, "Pulses")
    assert header["run_id"] == 1 and len(pulses) == 3 and truth["pid"] == pid and truth["energy"] == 7
    assert truth["zenith"] == 0.5 and truth["azimuth"] == 0.07
    assert truth["interaction_type"] == 2 and truth["position_z"] == 3


def test_primary_without_energy_is_the_second_particle(tmp_path):
    tree = i3.tree([(13, np.nan, [(13, 8., [])])])
    path = write(tmp_path / "a.i3", physics(I3MCTree=tree, Pulses=i3.pulse_map(SERIES)))
    assert read_i3(path, "Pulses")[1].energy.tolist() == [8]


def test_plain_values(tmp_path):
    values = dict(a=i3.Archive("I3Double").put("d", 2.5), b=i3.Archive("I3Int").put("i", -3),
                  c=i3.Archive("I3Bool").put("B", 1), d=i3.Archive("I3String").add(i3.text("so")))
    path = write(tmp_path / "a.i3", physics(e=i3.mapping("I3MapStringBool", "?", dict(x=True, y=False)),
                                            **{k: v.bytes() for k, v in values.items()}))
    frame = next(i3_frames(path))
    assert [frame[k] for k in "abcde"] == [2.5, -3, True, "so", dict(x=True, y=False)]
    assert "a" in frame and "z" not in frame and len(frame) == 6 and frame.kind("b") == "I3Int"


@pytest.mark.parametrize("versions", [(0, 0, 0), (1, 0, 1), (1, 1, 2), (2, 1, 2)])
def test_geometry_of_all_versions(tmp_path, versions): # of the geometry, its modules, their keys
    positions = {(1, 1, 0): (1., 2., 3.), (1, 61, 0): (0., 0., 1950.), (87, 1, 0): (4., 5., 6.)}
    path = write(tmp_path / "a.i3", i3.frame("G", dict(X=i3.geometry(positions, *versions))))
    assert next(i3_frames(path, "G"))["X"] == positions


def test_geometry_is_that_of_the_doms(tmp_path):
    xyz = Geometry.nominal().xyz
    known = {(k // 60 + 1, k % 60 + 1, 0): tuple(xyz[k]) for k in range(5160)}
    data = i3.geometry(known | {(1, 61, 0): (0, 0, 1950), (87, 1, 0): (1, 1, 1)})
    path = write(tmp_path / "gcd.i3", i3.frame("I", {}), i3.frame("G", {"I3Geometry": data}))
    assert np.array_equal(Geometry(i3_geometry(path)).xyz, xyz)
    path = write(tmp_path / "gcd.i3", i3.frame("G", {"I3Geometry": i3.geometry(dict([*known.items()][:-1]))}))
    with pytest.raises(DataError, match="I3Geometry lacks string-module 86-60"): i3_geometry(path)
    with pytest.raises(DataError, match="no frame holds I3Geometry"):
        i3_geometry(write(tmp_path / "b.i3", physics()))


def test_frames_lend_their_objects(tmp_path):
    def made(stop, **values):
        return i3.frame(stop, {k: i3.Archive("I3Int").put("i", value).bytes() for k, value in values.items()})

    path = write(tmp_path / "a.i3", made("G", g=1, x=1), made("C", c=2), made("Q", q=3, x=3), made("P", p=4),
                 made("P", x=5), made("Q", r=6), made("I", i=7), made("P"))
    first, second, third = i3_frames(path)
    assert sorted(first) == ["c", "g", "p", "q", "x"] and first["x"] == 1
    assert second["x"] == 5 and "p" not in second
    assert sorted(third) == ["c", "g", "r", "x"]
    assert [f.stop for f in i3_frames(path, "IQ")] == ["Q", "Q", "I"]


def test_events_that_share_a_number_are_kept_apart(tmp_path):
    twice = [i3.frame("P", {"I3EventHeader": i3.header(1, 2, k), "Pulses": i3.pulse_map(SERIES)})
             for k in (0, 1, 0)]
    pulses, truth = read_i3(write(tmp_path / "a.i3", *twice, physics()), "Pulses")
    assert truth.event_id.tolist() == [0, 1, 2] and truth.sub_event.tolist() == [0, 1, 0]
    assert pulses.groupby("event_id").size().tolist() == [3, 3, 3] and (pulses.run_id == 1).all()


def test_splits_without_an_event_in_the_ice_are_passed_over(tmp_path):
    frames = [i3.frame("Q", {"InIcePulses": i3.pulse_map(SERIES)})]
    for k, stream in enumerate(("NullSplit", "InIceSplit", "IceTopSplit", "ice_top", "InIceSplit")):
        objects = {"SplitInIcePulses": i3.mask("InIcePulses", [1, 0], [[k == 1, 1]])} if k in (1, 4) else {}
        frames.append(i3.frame("P", {"I3EventHeader": i3.header(1, 2, k, stream), **objects}))
    path = write(tmp_path / "a.i3", *frames)
    for name, n in ((None, [2, 1]), ("InIcePulses", [3, 3])):
        pulses, truth = read_i3(path, name)
        assert truth.sub_event.tolist() == [1, 4] and pulses.groupby("event_id").size().tolist() == n


def test_pulse_map_that_is_named_wrongly(tmp_path):
    path = write(tmp_path / "a.i3", physics(Mine=i3.pulse_map(SERIES)))
    for name in ("Yours", None):
        with pytest.raises(DataError, match="no physics frame has the pulse map .* there are Mine"):
            read_i3(path, name)
    masks = {key: i3.mask(source, [1], [[1]]) for key, source in dict(A="B", B="A", C="X").items()}
    path = write(tmp_path / "a.i3", physics(**masks, D=i3.mask("Map", [1, 1], [[1, 1]] * 2),
                                            Map=i3.pulse_map(SERIES)))
    frame = next(i3_frames(path))
    for key, message in dict(A="lead back to itself", C="no pulse map C -> X", D="the mask does not fit Map",
                             I3EventHeader="class I3EventHeader is no pulse map").items():
        with pytest.raises(DataError, match=message): frame.pulses(key)


@pytest.mark.parametrize("version", [5, 6])
def test_checksums(tmp_path, version):
    objects = {"I3EventHeader": i3.header(), "Pulses": i3.pulse_map(SERIES)}
    path = write(tmp_path / "a.i3", i3.frame("P", objects, version))
    assert len(read_i3(path, "Pulses")[0]) == 3
    write(path, physics(), i3.frame("P", objects, version, checksum=1))
    with pytest.raises(DataError, match="frame 1: its checksum is wrong.*1 frame before it was whole"):
        list(i3_frames(path))


@pytest.mark.parametrize("n", [1, 3, 4, 63, 64, 65, 128, 500])
def test_checksum_in_blocks_equals_the_definition(monkeypatch, n):
    monkeypatch.setattr("iceaggr.io.i3._BLOCK", 64)
    data = np.random.default_rng(n).bytes(n)
    assert _crc32c(data) == i3.crc32c(data)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2"])
def test_truncated_files_name_the_whole_frames(tmp_path, suffix):
    pack = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[suffix]
    data = physics() * 3
    (tmp_path / "whole").write_bytes(pack(data))     # the name does not matter
    assert len(list(i3_frames(tmp_path / "whole"))) == 3
    path = tmp_path / "part"
    for cut in (len(data) - 1, len(data) - 60, len(data) - len(physics()) + 2):
        path.write_bytes(pack(data[:cut]))
        with pytest.raises(DataError, match=r"part: frame 2: .*2 frames before it were whole"):
            list(i3_frames(path))
    path.write_bytes(pack(data)[:-9])
    if suffix:
        with pytest.raises(DataError, match="part: frame"): list(i3_frames(path))


def test_zstandard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = write(tmp_path / "a.i3.zst", b"\x28\xb5\x2f\xfd and more")
    with pytest.raises(DataError, match="pip install zstandard"): list(i3_frames(path))
    monkeypatch.delitem(sys.modules, "zstandard")
    zstandard = pytest.importorskip("zstandard")
    write(path, zstandard.compress(physics() * 2))
    assert len(list(i3_frames(path))) == 2


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"): list(i3_frames(tmp_path / "a.i3"))
    for data in (b"", b"event_id\n1\n"):
        with pytest.raises(DataError, match="not an i3 file"): list(i3_frames(write(tmp_path / "a.i3", data)))
    with pytest.raises(DataError, match="frame 1: it begins with b'xxxx'"):
        list(i3_frames(write(tmp_path / "a.i3", physics(), b"x" * 99)))
    old = b"[i3]" + struct.pack("<IBB", 4, 0, 0) + bytes(99)
    with pytest.raises(DataError, match="version 4 of the frame format is not known"):
        list(i3_frames(write(tmp_path / "a.i3", old)))


UNKNOWN = {
    "class I3Strange is not decoded": i3.Archive("I3Strange"),
    "version 4 of class I3EventHeader is not known; known: 0, 1, 2, 3": i3.Archive("I3EventHeader", 4),
    "version 0 of class I3SuperDST is not known": i3.Archive("I3SuperDST", 0),
    "version 4 of class I3Particle is not known": i3.Archive("I3Particle", 4),
    "version 2 of class I3MCTree is not known": i3.Archive("I3MCTree", 2),
    "version 3 of class I3RecoPulseSeriesMapMask is not known": i3.Archive("I3RecoPulseSeriesMapMask", 3),
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_unknown_classes_and_versions_are_named(tmp_path, message):
    path = write(tmp_path / "a.i3", i3.frame("I", {}), physics(X=UNKNOWN[message].bytes()))
    frame = next(i3_frames(path))
    with pytest.raises(DataError, match=rf"a.i3: frame 1 \(P\), key X: {message}"): frame["X"]


def damaged():
    "Objects that announce too much, end too early or contradict themselves."
    readout = [(1, 5, 1, [(600, 70, 3)])]
    huge = i3.Archive("I3RecoPulseSeriesMap").enter("map").put("I", 1).enter("pair")
    i3.om_key(huge, (1, 1, 0))
    huge.enter("vector").put("I", 2**31).enter("pulse", 3, True)
    yield "2,147,483,648 items are announced", huge.bytes()
    names = i3.Archive("I3MapStringDouble").enter("map").put("I", 2**31).enter("pair")
    yield "its bytes end too early", names.bytes()
    yield "announced", i3.Archive("I3String").put("I", 2**31).bytes()
    yield "announced", i3.Archive("I3String").put("I", 2**32 - 1).put("Q", 2**62).bytes()
    yield "its bytes end too early", i3.Archive("I3ParticleVect").enter("vector").put("I", 2**30).bytes()
    many = i3.Archive("I3ParticleVect").enter("vector").put("I", 2**30)
    i3.particle_bytes(many, 14, 1.)
    yield "announced", many.bytes()
    yield "announced", i3.Archive("I3MCTree", 1).put("I", 65_535).put("I", 2**31).bytes()
    for data in (i3.header(), i3.pulse_map(SERIES), i3.super_dst(readout), i3.mask("A", [1, 1], [[1], [0]]),
                 i3.tree(TREE), i3.tree(TREE, 0), i3.particle(), i3.union("A", "B")):
        yield "", data[:-1]
        yield "left over|does not close|announced|end", data + b"\0" * 3
    yield "object .* in place of", i3.Archive("I3EventHeader", 3).bytes()[:-4] + bytes(70)
    yield "are no time", i3.header(start=(-4, 5))


def test_damaged_objects_are_refused(tmp_path):
    for message, data in damaged():
        frame = next(i3_frames(write(tmp_path / "a.i3", physics(X=data))))
        with pytest.raises(DataError, match=rf"key X: .*({message})"): frame["X"]


def test_random_damage_ends_in_an_error_that_names_the_file(tmp_path):
    rng, refused = np.random.default_rng(1), 0
    objects = dict(S=i3.super_dst(random_readouts(rng, 20)), M=i3.mask("S", [1] * 9, [[1, 0]] * 9),
                   T=i3.tree(TREE), O=i3.tree(TREE, 0), P=i3.pulse_map(SERIES), H=i3.header(),
                   G=i3.geometry({(1, 1, 0): (1, 2, 3)}))
    for _ in range(120):
        changed = {k: bytearray(v) for k, v in objects.items()}
        for data in changed.values(): data[rng.integers(30, len(data))] = rng.integers(256)
        frame = next(i3_frames(write(tmp_path / "a.i3", i3.frame("P", changed, 5))))
        for key in frame:
            try: frame[key]
            except DataError as error:
                refused += 1
                assert "a.i3: frame 0 (P), key" in str(error)
    assert refused > 120


def test_absurd_sizes_in_a_frame_take_no_memory(tmp_path):
    start = b"[i3]" + struct.pack("<IBB", 6, 0, 0)
    for body in (b"P" + struct.pack("<I", 2**32 - 1), b"P" + struct.pack("<II", 1, 2**31),
                 b"P" + struct.pack("<IIQ", 1, 2**32 - 1, 2**63), b"P" + struct.pack("<II", 1, 2**28)):
        path = write(tmp_path / "a.i3", physics(), start + body + bytes(1000))
        with pytest.raises(DataError, match="frame 1: .*1 frame before it was whole"): list(i3_frames(path))
