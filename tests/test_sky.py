"""Local directions and the sky: conventions against published events, and there and back."""
import socket
import sys

import numpy as np
import pandas as pd
import pytest
from astropy.utils import iers
from astropy.utils.exceptions import AstropyWarning
from conftest import folder_of

from iceaggr import sky


def test_published_events():
    "Right ascension and declination of IceCube's publications, to 0.25 degrees."
    events = pd.read_csv(folder_of("ICEAGGR_RECORDED", "recorded events") / "events.csv").dropna()
    ra, dec = sky.equatorial(events.azimuth, events.zenith, events.mjd)
    along = (np.degrees(ra) - events.ra_deg) * np.cos(dec)
    assert np.hypot(along, np.degrees(dec) - events.dec_deg).max() < 0.25


def test_there_and_back():
    rng = np.random.default_rng(0)
    azimuth, zenith = rng.uniform(0, 2 * np.pi, 100), np.arccos(rng.uniform(-1, 1, 100))
    mjd = rng.uniform(55_000, 61_000, 100)
    back = sky.horizontal(*sky.equatorial(azimuth, zenith, mjd), mjd)
    turn = np.remainder(back[0] - azimuth + np.pi, 2 * np.pi) - np.pi
    assert np.abs(turn * np.sin(zenith)).max() < 1e-6 and np.abs(back[1] - zenith).max() < 1e-6


def test_the_sky_turns_with_the_earth():
    "Declination stays; right ascension gains 15 degrees an hour, and a full turn in a sidereal day."
    hours = np.array([0, 1, 23.9344696])
    ra, dec = sky.equatorial(1.0, 1.8, 58_000 + hours / 24)
    assert np.degrees(ra[1] - ra[0]) % 360 == pytest.approx(15.04, abs=0.02)
    assert np.degrees(ra[2] - ra[0] + 1) % 360 == pytest.approx(np.degrees(1), abs=0.02)
    assert np.degrees(dec) == pytest.approx(np.degrees(1.8) - 90, abs=0.15)


def test_azimuth_runs_against_right_ascension():
    "Seen from above, azimuth counts counterclockwise; seen from below, so does right ascension."
    ra, _ = sky.equatorial([1.0, 1.1], [1.5, 1.5], 58_000)
    assert np.degrees(ra[1] - ra[0]) == pytest.approx(-np.degrees(0.1), abs=0.01)


def test_no_download(monkeypatch):
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex"): monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.warns(AstropyWarning, match="polar motions"): sky.equatorial([1.0], [1.0], [62_000.0])
    assert not tried and iers.conf.auto_download and iers.conf.auto_max_age == 30


def test_missing_astropy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "astropy", None)
    with pytest.raises(ModuleNotFoundError, match=r"iceaggr\[sky\]"): sky.equatorial(1, 1, 58_000)


def test_values_that_are_not_finite():
    for wrong in ((np.nan, 1, 58_000), (1, np.inf, 58_000), (1, 1, np.nan)):
        with pytest.raises(ValueError, match="not finite"): sky.equatorial(*wrong)
