"""Sky maps: against closed forms and uniform grids, as files for other programs, and what bad input does."""
import gzip
import importlib.util
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import folder_of

from iceaggr import sky

pytest.importorskip("astropy_healpix")

from iceaggr import skymap  # noqa: E402
from iceaggr.common import DataError  # noqa: E402
from iceaggr.skymap import SkyMap, contours, plot_map, rotation_to_detector, sky_map, sky_maps  # noqa: E402

KAPPAS = [0.01, 0.3, 3.0, 10.0, 30.0, 300.0, 1e4, 1e5, 1e6]


def random_directions(n, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(n, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def mixture(weights, centers, kappas):
    "ln of a sum of von Mises-Fisher densities, of one event."
    log_norm = np.log(weights * kappas / (2 * np.pi)) - np.log(-np.expm1(-2 * kappas))

    def log_density(directions):
        half_chord = np.linalg.norm(directions[:, None] - centers, axis=-1) / 2
        return np.logaddexp.reduce(log_norm - 2 * kappas * half_chord ** 2, axis=1)
    return log_density


def single(center, kappa):
    "Density and components of one von Mises-Fisher distribution."
    center, kappa = np.reshape(center, (1, 3)), np.array([kappa])
    return mixture(np.ones(1), center, kappa), center, kappa


def exact_area(kappa, level):
    "Of one von Mises-Fisher density [square degrees]."
    return -2 * np.pi * np.log1p(level * np.expm1(-2 * kappa)) / kappa * np.degrees(1) ** 2


def three_modes(seed=1):
    centers, kappas = random_directions(3, seed), np.array([2000.0, 30.0, 300.0])
    return mixture(np.array([0.6, 0.3, 0.1]), centers, kappas), centers, kappas


@pytest.mark.parametrize("kappa", KAPPAS)
def test_closed_form(kappa):
    "Integral, areas, values and peak."
    for center in random_directions(12):
        density, centers, kappas = single(center, kappa)
        found = sky_map(density, centers, kappas)
        assert found.integral() == pytest.approx(1, abs=1e-9)
        for level in (0.5, 0.9): assert found.area(level) == pytest.approx(exact_area(kappa, level), rel=0.01)
        assert found.area(0.99) == pytest.approx(exact_area(kappa, 0.99), rel=0.03)
        exact = np.exp(density(found.directions()))
        assert np.abs(found.density - exact).max() < 0.05 * exact.max()
        if kappa >= 30:
            peak = skymap._vectors("detector", *found.peak())
            assert np.linalg.norm(peak - center) < 0.3 / np.sqrt(kappa)


def test_uniform_grid():
    "The multi-order map has in each pixel of one order the probability that a fine grid has there."
    density, centers, kappas = three_modes()
    found = sky_map(density, centers, kappas)
    fine = np.exp(density(skymap._centers(8, np.arange(12 * 4 ** 8))))
    coarse = fine.reshape(-1, 4 ** 4).mean(1)
    assert np.abs(found.rasterize(4) - coarse).sum() * np.pi / 3 / 4 ** 4 < 5e-3
    assert found.rasterize(9).mean() * 4 * np.pi == pytest.approx(1, abs=1e-9)
    assert np.allclose(found.rasterize(9).reshape(-1, 4 ** 5).mean(1), found.rasterize(4))


def test_narrow_component_of_small_weight():
    "A peak of 0.06 degrees with 2 % of the probability, far from the rest, is found."
    centers = random_directions(2, 4)
    density = mixture(np.array([0.98, 0.02]), centers, np.array([10.0, 1e6]))
    found = sky_map(density, centers, [10.0, 1e6])
    near = np.linalg.norm(found.directions() - centers[1], axis=1) < 5e-3
    assert (found.density * found.pixel_area)[near].sum() == pytest.approx(0.02, rel=0.05)
    with pytest.raises(ValueError, match="integrates to 0.98"): sky_map(density, centers[:1], [10.0])


def test_batch_is_the_events_one_by_one():
    n = 40                                         # more than one chunk
    centers, rng = random_directions(2 * n, 5).reshape(n, 2, 3), np.random.default_rng(5)
    kappas, mjd = 10 ** rng.uniform(0, 5, (n, 2)), rng.uniform(55_000, 61_000, n)
    mjd[::3] = np.nan
    alone = [mixture(np.array([0.5, 0.5]), c, k) for c, k in zip(centers, kappas, strict=True)]

    def log_density(directions, event):
        out = np.empty(len(event))
        for i in np.unique(event): out[event == i] = alone[i](directions[event == i])
        return out
    maps = sky_maps(log_density, centers, kappas, mjd, np.arange(n))
    for i in range(n):
        time = None if np.isnan(mjd[i]) else mjd[i]
        one = sky_map(alone[i], centers[i], kappas[i], time, i)
        assert maps[i].event == str(i) and maps[i].mjd == one.mjd and maps[i].frame == one.frame
        assert (maps[i].uniq == one.uniq).all() and np.allclose(maps[i].density, one.density, rtol=1e-6)


def test_credible_level_of_samples():
    "Directions drawn from the density: their credible levels are uniform, and regions hold their level."
    import torch
    from scipy.stats import kstest

    from iceaggr.direction import vmf_sample

    centers, kappas = random_directions(2, 6), np.array([200.0, 5000.0])
    found = sky_map(mixture(np.array([0.5, 0.5]), centers, kappas), centers, kappas)
    generator = torch.Generator().manual_seed(0)
    drawn = vmf_sample(torch.tensor(centers), torch.tensor(kappas), 2000, generator).numpy()
    angles = skymap._angles("detector", drawn.reshape(-1, 3))
    assert kstest(found.credible_level(*angles), "uniform").pvalue > 0.01
    for level in (0.5, 0.9): assert found.contains(*angles, level).mean() == pytest.approx(level, abs=0.03)
    held = (found.density * found.pixel_area)[found.region(0.9)].sum()
    assert 0.9 <= held < 0.905


def test_rotation():
    "A rotation, within 0.01 degrees of astropy's transformation at any time."
    mjd = np.random.default_rng(0).uniform(55_000, 61_000, 20)
    rotations, vectors = rotation_to_detector(mjd), random_directions(200)
    assert np.allclose(rotations @ np.swapaxes(rotations, 1, 2), np.eye(3))
    assert np.allclose(np.linalg.det(rotations), 1)
    assert np.allclose(rotation_to_detector(mjd[3]), rotations[3])
    for time, rotation in zip(mjd, rotations, strict=True):
        exact = skymap._vectors("detector", *sky.horizontal(*skymap._angles("icrs", vectors), time))
        assert np.degrees(np.linalg.norm(vectors @ rotation.T - exact, axis=1).max()) < 0.01


def test_published_events():
    "A map at the published local direction has its peak at the published right ascension and declination."
    events = pd.read_csv(folder_of("ICEAGGR_RECORDED", "recorded events") / "events.csv").dropna()
    for event in events.itertuples():
        center = skymap._vectors("detector", event.azimuth, event.zenith)
        found = sky_map(*single(center, 3e4), mjd=event.mjd, event=event.name)
        ra, dec = np.degrees(found.peak())
        off = np.hypot((ra - event.ra_deg) * np.cos(np.radians(dec)), dec - event.dec_deg)
        assert found.frame == "icrs" and off < 0.3


@pytest.fixture(params=["peak.fits", "peak.fits.gz"])
def written(request, tmp_path):
    "An equatorial map of three modes, and its file."
    found = sky_map(*three_modes(), mjd=56_819.20441234567, event="run 120000 event 42")
    found.write(tmp_path / request.param)
    return found, tmp_path / request.param


def test_file_is_exact(written):
    from astropy.io import fits
    from astropy.time import Time

    found, path = written
    back = SkyMap.read(path)
    assert (back.uniq == found.uniq).all() and (back.density == found.density).all()
    assert back.uniq.dtype == np.int64 and back.density.dtype == np.float64
    assert (back.frame, back.mjd, back.event) == ("icrs", found.mjd, found.event)
    with fits.open(path) as hdus:
        hdus.verify("exception")
        header = hdus[1].header
    expected = {"PIXTYPE": "HEALPIX", "ORDERING": "NUNIQ", "COORDSYS": "C", "INDXSCHM": "EXPLICIT",
                "TTYPE1": "UNIQ", "TTYPE2": "PROBDENSITY", "TUNIT2": "sr-1", "CREATOR": "iceaggr"}
    assert {k: header[k] for k in expected} == expected and "DISTMEAN" not in header
    assert header["MOCORDER"] == skymap._order(found.uniq).max()
    assert Time(header["DATE-OBS"], scale="utc").mjd == pytest.approx(found.mjd, abs=1e-7)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore")
def test_without_a_time(tmp_path):
    "A map in detector coordinates says so, and nobody takes it for the sky."
    from astropy.io import fits

    path = tmp_path / "local.fits"
    sky_map(*three_modes()).write(path)
    header = fits.getheader(path, 1)
    assert header["COORDSYS"] == "DETECTOR" and "MJD-OBS" not in header and "DATE-OBS" not in header
    assert "not equatorial" in str(header["COMMENT"]) and "90 degrees - zenith" in str(header["COMMENT"])
    back = SkyMap.read(path)
    assert back.frame == "detector" and back.mjd is None
    if importlib.util.find_spec("mhealpy"):
        import mhealpy
        with pytest.raises(ValueError, match="frame"): mhealpy.HealpixMap.read_map(str(path))
    with pytest.raises(ValueError, match="equatorial"):
        pytest.importorskip("ligo.skymap.io.fits").read_sky_map(str(path), moc=True)


@pytest.mark.filterwarnings("ignore")
def test_ligo_skymap(written):
    pytest.importorskip("ligo.skymap")
    from astropy.coordinates import SkyCoord
    from ligo.skymap.io.fits import read_sky_map
    from ligo.skymap.postprocess import crossmatch

    found, path = written
    table = read_sky_map(str(path), moc=True)
    ra, dec = found.peak()
    there = crossmatch(table, SkyCoord(ra, dec, unit="rad"), contours=[0.5, 0.9])
    assert there.contour_areas == pytest.approx([found.area(0.5), found.area(0.9)], rel=0.01)
    assert there.searched_prob < 0.01                  # the peak is where the density is highest
    assert (table["UNIQ"] == found.uniq).all() and table.meta["objid"] == found.event
    flat, meta = read_sky_map(str(path), nest=True)
    assert flat.sum() == pytest.approx(1, abs=1e-4) and meta["nest"]


@pytest.mark.filterwarnings("ignore")
def test_mhealpy(written):
    mhealpy = pytest.importorskip("mhealpy")
    found, path = written
    opened = mhealpy.HealpixMap.read_map(str(path))
    data = np.asarray(opened.data)
    area = np.array([opened.pixarea(i).value for i in range(opened.npix)])
    assert opened.is_moc and opened.density() and (data * area).sum() == pytest.approx(1, abs=1e-4)
    order = np.argsort(-data)
    held = np.cumsum((data * area)[order])
    inside = area[order][: np.searchsorted(held, 0.9) + 1].sum() * np.degrees(1) ** 2
    assert inside == pytest.approx(found.area(0.9), rel=0.01)
    vector = np.array(opened.pix2vec(int(data.argmax())))
    assert np.linalg.norm(vector - skymap._vectors("icrs", *found.peak())) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_healpy(tmp_path):
    healpy = pytest.importorskip("healpy")
    found = sky_map(*three_modes(), mjd=58_000.0)
    flat = found.rasterize(7)
    healpy.write_map(str(tmp_path / "flat.fits"), flat, nest=True, coord="C", dtype=np.float64)
    ring = healpy.read_map(str(tmp_path / "flat.fits"))
    area = healpy.nside2pixarea(128)
    assert ring.sum() * area == pytest.approx(1, abs=1e-4)
    held = np.cumsum(np.sort(ring)[::-1]) * area
    inside = (np.searchsorted(held, 0.9) + 1) * area * np.degrees(1) ** 2
    assert inside == pytest.approx(found.area(0.9), rel=0.01)
    vector = np.array(healpy.pix2vec(128, int(ring.argmax())))
    assert np.linalg.norm(vector - skymap._vectors("icrs", *found.peak())) < healpy.nside2resol(128)


def bad_files():
    "Name, and what makes a file of a good map bad."
    from astropy.io import fits

    def table(path, change):
        with fits.open(path, memmap=False) as hdus:
            header, data = hdus[1].header.copy(), hdus[1].data.copy()
        columns = change(header, {c: data[c].copy() for c in ("UNIQ", "PROBDENSITY")})
        made = [fits.Column(c, "K" if c == "UNIQ" else "D", array=a) for c, a in columns.items()]
        hdu = fits.BinTableHDU.from_columns(made)
        for key in ("ORDERING", "COORDSYS", "OBJECT"):
            if key in header: hdu.header[key] = header[key]
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(path, overwrite=True)

    def without(column): return lambda path: table(path, lambda h, c: {k: c[k] for k in c if k != column})

    def keyword(key, value):
        def change(header, columns):
            header[key] = value
            return columns
        return lambda path: table(path, change)

    def values(column, row, value):
        def change(header, columns):
            columns[column][row] = value
            return columns
        return lambda path: table(path, change)

    def shorter(path): table(path, lambda h, c: {k: a[:-1] for k, a in c.items()})

    def cut(path): path.write_bytes(path.read_bytes()[:-9000])

    return {"no FITS": (lambda path: path.write_text("nothing"), "SIMPLE"),
            "empty": (lambda path: path.write_bytes(b""), "mpty"), "truncated": (cut, "truncated"),
            "no table": (lambda path: fits.PrimaryHDU().writeto(path, overwrite=True), "no table"),
            "no UNIQ": (without("UNIQ"), "UNIQ is missing"),
            "no density": (without("PROBDENSITY"), "PROBDENSITY is missing"),
            "one order": (keyword("ORDERING", "NESTED"), "ORDERING is NESTED"),
            "galactic": (keyword("COORDSYS", "G"), "COORDSYS is G"),
            "twice": (values("UNIQ", 1, 256), "exactly once"), "a hole": (shorter, "exactly once"),
            "number": (values("UNIQ", 0, 3), "below 4"),
            "large": (values("UNIQ", -1, 2 ** 62 + 1), "large"),
            "nan": (values("PROBDENSITY", 3, np.nan), "not finite"),
            "negative": (values("PROBDENSITY", 3, -1.0), "negative"),
            "integral": (values("PROBDENSITY", 3, 1e3), "integral")}


@pytest.mark.parametrize("case", list(bad_files()))
def test_bad_files(tmp_path, case):
    path = tmp_path / "map.fits"
    sky_map(*three_modes(), mjd=58_000.0).write(path)
    spoil, message = bad_files()[case]
    spoil(path)
    with pytest.raises(DataError, match=message) as e: SkyMap.read(path)
    assert str(path) in str(e.value)


@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes(tmp_path):
    "Whatever bytes of the headers or of a compressed file change: a map or a DataError."
    rng, path = np.random.default_rng(0), tmp_path / "map.fits.gz"
    sky_map(*single([0, 0, 1.0], 100.0)).write(path)
    for raw in (path.read_bytes(), gzip.decompress(path.read_bytes())):
        spoiled = tmp_path / ("a.fits" if raw[:2] == b"SI" else "a.fits.gz")
        for _ in range(60):
            data = bytearray(raw)
            for at in rng.integers(0, min(len(raw), 8640), 4): data[at] = rng.integers(0, 256)
            spoiled.write_bytes(data)
            try: SkyMap.read(spoiled)
            except DataError as e: assert str(spoiled) in str(e)


def test_no_file_and_wrong_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"): SkyMap.read(tmp_path / "nowhere.fits")
    with pytest.raises(DataError, match="regular file"): SkyMap.read(tmp_path)
    found = sky_map(*single([0, 0, 1.0], 10.0))
    with pytest.raises(ValueError, match=".fits.gz"): found.write(tmp_path / "map.txt")
    with pytest.raises(OSError): found.write(tmp_path / "no folder" / "map.fits")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from astropy.io import fits

    path = tmp_path / "map.fits"
    found = sky_map(*single([0, 0, 1.0], 10.0))
    found.write(path)
    before = path.read_bytes()

    def fail(self, name, **options):
        with open(name, "wb") as file: file.write(b"half")
        raise OSError("disk full")
    monkeypatch.setattr(fits.HDUList, "writeto", fail)
    with pytest.raises(OSError, match="disk full"): found.write(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_bad_input():
    density, centers, kappas = single([0, 0, 1.0], 10.0)
    with pytest.raises(ValueError, match="shape"): sky_map(density, centers[0], kappas)
    with pytest.raises(ValueError, match="kappa"): sky_map(density, centers, [np.nan])
    with pytest.raises(ValueError, match="unit vectors"): sky_map(density, 2 * centers, kappas)
    with pytest.raises(ValueError, match="not 1"): sky_map(lambda d: density(d) + 0.1, centers, kappas)
    with pytest.raises(ValueError, match="event 0 e7"):
        sky_map(lambda d: np.full(len(d), np.nan), centers, kappas, event="e7")
    with pytest.raises(ValueError, match="names"):
        sky_maps(lambda d, _: density(d), centers[None], [kappas], events=[1, 2])
    with pytest.raises(ValueError, match="one value per direction"):
        sky_map(lambda d: density(d)[:, None], centers, kappas)
    found = sky_map(density, centers, kappas)
    for level in (0, 1, 90):
        for method in (found.area, found.region):
            with pytest.raises(ValueError, match="between 0 and 1"): method(level)
    with pytest.raises(ValueError, match="not finite"): found.credible_level(np.nan, 0)
    cases = (({"frame": "galactic"}, "frame"), ({"event": "µ"}, "ASCII"), ({"mjd": np.inf}, "mjd"),
             ({"density": found.density[1:]}, "shape"), ({"uniq": found.uniq + 1}, "once"))
    for wrong, message in cases:
        facts = {"uniq": found.uniq, "density": found.density, **wrong}
        with pytest.raises(ValueError, match=message): SkyMap(**facts)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "astropy_healpix", None)
    with pytest.raises(ModuleNotFoundError, match=r"iceaggr\[sky\]"): sky_map(*single([0, 0, 1.0], 10.0))


def polygon_area(line, frame="detector"):
    "Area within a line on the sphere around its mean, by the triangles of its edges [square degrees]."
    v = skymap._vectors(frame, *np.radians(line.T))
    center = v.mean(0) / np.linalg.norm(v.mean(0))
    a, b = v[:-1], v[1:]
    volume = np.linalg.det(np.stack([np.broadcast_to(center, a.shape), a, b], 1))
    solid = 2 * np.arctan2(volume, 1 + a @ center + b @ center + (a * b).sum(1))
    return abs(solid.sum()) * np.degrees(1) ** 2


@pytest.mark.parametrize("center", [[1, 0, 0.001], [0, 0, 1], [0, 0, -1], [-1, 0, 0.2]])
def test_contours_of_one_mode(center):
    "One closed line, wherever it lies: also around a pole and across the origin of the right ascension."
    pytest.importorskip("matplotlib")
    center = np.array(center) / np.linalg.norm(center)
    found = sky_map(*single(center, 2000.0), mjd=58_000.0)
    for level in (0.5, 0.9):
        line, = contours(found, level)
        assert (line[0] == line[-1]).all()
        assert polygon_area(line, "icrs") == pytest.approx(found.area(level), rel=0.02)
        assert np.abs(found.credible_level(*np.radians(line.T)) - level).max() < 0.05


def test_contours_of_opposite_modes_and_of_a_wide_one():
    pytest.importorskip("matplotlib")
    center = random_directions(1)
    both = np.concatenate([center, -center])
    kappas = np.array([500.0, 500.0])
    lines = contours(sky_map(mixture(np.array([0.5, 0.5]), both, kappas), both, kappas))
    assert len(lines) == 2
    for line in lines: assert polygon_area(line) == pytest.approx(exact_area(500.0, 0.9), rel=0.03)
    wide = sky_map(*single(center, 0.5))
    line, = contours(wide)
    assert polygon_area(line) == pytest.approx(4 * np.pi * np.degrees(1) ** 2 - wide.area(), rel=0.02)


def test_drawing_changes_no_state():
    plt = pytest.importorskip("matplotlib.pyplot")
    before, figures = dict(plt.rcParams), plt.get_fignums()
    found = sky_map(*three_modes(), mjd=58_000.0)
    ra, dec = np.degrees(found.peak())
    whole, zoom = plot_map(found, mark=(ra, dec)), plot_map(found, radius=3, mark=(ra, dec))
    polar = plot_map(sky_map(*single([0, 0.01, 1.0] / np.hypot(1, 0.01), 500.0)), radius=10)
    for ax in (whole, zoom, polar): ax.figure.canvas.draw()
    for ax in (whole, zoom):
        assert f"90 %: {found.area(0.9):,.0f} deg²" in [t.get_text() for t in ax.get_legend().texts]
    assert dict(plt.rcParams) == before and plt.get_fignums() == figures
    assert zoom.get_xlabel() == "right ascension [degrees]" and polar.get_ylabel() == "zenith [degrees]"
    marked = next(line for line in zoom.lines if line.get_label() == "published")
    assert np.allclose(marked.get_xydata(), 0, atol=1e-6)              # the centre of the view is the peak
    with pytest.raises(ValueError, match="mollweide"): plot_map(found, ax=zoom)
    with pytest.raises(ValueError, match="60 degrees"): plot_map(found, radius=80)
