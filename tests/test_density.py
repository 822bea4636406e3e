"""Densities on the sphere, against closed forms, random directions and a grid; their head and its maps."""
import math

import numpy as np
import pandas as pd
import pytest
import torch

from iceaggr.cli import main
from iceaggr.data import IceCubeDataset
from iceaggr.density import SkyDensity, SphereMixture, density_table, mixture_of, tangents
from iceaggr.direction import angles_to_vector, angular_error, vmf_loss, vmf_quantile, vmf_resultant
from iceaggr.model import HierarchicalTransformer, predict_dataset
from iceaggr.packing import collate_dom_packing
from iceaggr.sky_density import fit_density, mixture_maps, pooled_events, write_maps

KAPPAS = 0.01, 0.5, 3.0, 40.0, 1e3, 1e4, 1e6


def random_mixture(n=5, k=4, seed=0, dtype=torch.float64):
    "Densities with components of all widths."
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(n, k, 3, generator=generator, dtype=dtype)
    kappas = 10 ** (torch.rand(n, k, generator=generator, dtype=dtype) * 4 - 1)
    return SphereMixture(torch.randn(n, k, generator=generator, dtype=dtype), means, kappas)


def grid(n=500):
    "Directions over the sphere, and the area of each."
    zenith = (torch.arange(n, dtype=torch.float64) + 0.5) / n * math.pi
    azimuth = (torch.arange(2 * n, dtype=torch.float64) + 0.5) / n * math.pi
    area = (zenith.sin() * 2 * math.sin(math.pi / n / 2) * math.pi / n)[:, None].expand(n, 2 * n)
    return angles_to_vector(azimuth, zenith[:, None]).reshape(1, -1, 3), area.reshape(-1)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_one_component_is_a_von_mises_fisher_density(kappa):
    "In float32, near and far from the mean, against float64."
    mean = angles_to_vector(torch.tensor([2.0]), torch.tensor([1.1]))
    mixture = SphereMixture(torch.zeros(1, 1), mean[None], torch.tensor([[kappa]]))
    step = torch.tensor([0.0, 0.5, 2.0, 4.0])[:, None] / math.sqrt(kappa + 1)
    east, _ = tangents(mean)
    points = step.cos() * mean + step.sin() * east
    expected = -vmf_loss(kappa * mean.double(), points.double(), "none")
    assert torch.allclose(mixture.log_density(points[None])[0].double(), expected, atol=1e-2, rtol=1e-4)


def test_density_is_normalised():
    points, area = grid()
    kappas = torch.tensor([[0.01, 30.0], [2.0, 400.0]], dtype=torch.float64)
    mixture = SphereMixture(torch.zeros(2, 2).double(), torch.randn(2, 2, 3).double(), kappas)
    density = mixture.log_density(points.expand(2, -1, 3)).exp()
    assert torch.allclose((density * area).sum(1), torch.ones(2).double(), atol=1e-4)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_closed_forms_of_one_component(kappa):
    mixture = SphereMixture(torch.zeros(1, 1).double(), torch.tensor([[[0.3, -0.8, 0.2]]]).double(),
                            torch.tensor([[kappa]]).double())
    radius = vmf_quantile(torch.tensor([kappa]).double(), 0.9)
    area = 2 * math.pi * (1 - radius.cos()) * math.degrees(1) ** 2
    assert mixture.area(0.9) == pytest.approx(float(area), rel=0.02)
    assert angular_error(mixture.median_direction(), mixture.means[:, 0]) < 0.2 / math.sqrt(kappa + 1)
    assert torch.allclose(mixture.mean_direction(), mixture.means[:, 0])


def test_means_over_the_density_agree_with_random_directions():
    mixture = random_mixture()
    random = mixture.sample(20_000, torch.Generator().manual_seed(1))
    assert torch.allclose(random.norm(dim=-1), torch.ones(5, 20_000).double())
    lengths = mixture.log_weights.exp() * vmf_resultant(mixture.kappas)
    mean = (lengths[..., None] * mixture.means).sum(1)
    assert torch.allclose(random.mean(1), mean, atol=0.02)
    assert torch.allclose(torch.nn.functional.normalize(mean, dim=-1), mixture.mean_direction())
    entropy = -mixture.log_density(random).mean(1)
    assert torch.allclose(mixture.entropy(256), entropy, atol=0.08)


def test_regions_hold_what_they_say():
    mixture = random_mixture()
    random = mixture.sample(2_000, torch.Generator().manual_seed(2))
    for k in range(5):
        levels = mixture[[k] * 2_000].credible_level(random[k], n=64)
        for level in (0.5, 0.9):
            assert float((levels < level).double().mean()) == pytest.approx(level, abs=0.035)


def test_area_agrees_with_a_grid():
    points, area = grid()
    kappas = torch.tensor([[20.0, 60.0], [5.0, 150.0]], dtype=torch.float64)
    means = torch.tensor([[[1.0, 0, 0], [0, 1, 0.4]], [[0, 0, 1], [0, 1, 1]]]).double()
    mixture = SphereMixture(torch.zeros(2, 2).double(), means, kappas)
    density, order = mixture.log_density(points.expand(2, -1, 3)).sort(descending=True)
    held = (density.exp() * area[order]).cumsum(1)
    expected = (area[order] * (held < 0.9)).sum(1) * math.degrees(1) ** 2
    assert torch.allclose(mixture.area(0.9, n=256), expected, rtol=0.02)


def test_median_has_the_least_expected_angle():
    "Against the best direction of a grid."
    mixture = random_mixture(seed=3)
    points, weights = mixture.points(64)
    def expected(directions): return (weights[:, None] * angular_error(
        points[:, None], directions[:, :, None])).sum(-1)
    candidates = grid(40)[0].expand(5, -1, 3)
    best = expected(candidates).min(1).values
    found = expected(mixture.median_direction()[:, None])[:, 0]
    assert (found < best + math.radians(1)).all()
    assert (found <= expected(mixture.mean_direction()[:, None])[:, 0] + 1e-3).all()


@pytest.mark.parametrize("kappa", [1e-2, 1e6])
def test_gradients_are_finite(kappa):
    "At the mean, opposite to it, and at the poles."
    directions = torch.tensor([[0.0, 0, 1], [0, 0, -1], [1, 0, 0]])
    means = torch.tensor([[[0.0, 0, 1]]]).expand(3, 1, 3).clone().requires_grad_()
    kappas = torch.full((3, 1), kappa, requires_grad=True)
    SphereMixture(torch.zeros(3, 1), means, kappas).log_density(directions).sum().backward()
    assert means.grad.isfinite().all() and kappas.grad.isfinite().all()
    head = SkyDensity(8).requires_grad_(True)
    torch.nn.init.normal_(head.out.weight)
    head(torch.randn(3, 8), kappa * directions).log_density(directions).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_tables_keep_the_densities():
    mixture = random_mixture()
    again = mixture_of(density_table(mixture))
    points = mixture.sample(10, torch.Generator().manual_seed(0))
    assert torch.allclose(again.log_density(points), mixture.log_density(points), atol=1e-9)
    with pytest.raises(ValueError, match="no densities"): mixture_of(pd.DataFrame({"event_id": [1]}))


@pytest.mark.parametrize("name", ["small", "base"])
def test_pretrained_densities(name, tiny_dataset):
    "The direction stays that of the first head; densities do not depend on the batch."
    model = HierarchicalTransformer.from_pretrained(name)
    dataset = IceCubeDataset(tiny_dataset)
    plain, table = (predict_dataset(model, dataset, progress=False, density=d) for d in (False, True))
    pd.testing.assert_frame_equal(table[plain.columns], plain)
    alone = model.predict([collate_dom_packing([dataset[3]])], density=True)
    found = table[table.event_id == alone.event_id[0]].reset_index(drop=True)
    pd.testing.assert_frame_equal(alone, found, rtol=1e-3, atol=1e-4)
    weights = table.filter(like="weight_").sum(axis=1)
    assert np.allclose(weights, 1) and (table.area_50 < table.area_90).all()


def test_head_that_was_not_trained_is_refused(tiny_dataset, tmp_path, capsys):
    model = HierarchicalTransformer("small")
    with pytest.raises(ValueError, match="not trained: call iceaggr.sky_density.fit_density"):
        model.predict([], density=True)
    model.save(tmp_path / "m.safetensors")
    assert main(["skymap", "--data", str(tiny_dataset), "--run", str(tmp_path / "m.safetensors"),
                 "--out", str(tmp_path / "maps")]) == 1
    assert "not trained" in capsys.readouterr().err and not (tmp_path / "maps").exists()


def test_fit_changes_only_the_head_and_is_saved(tiny_dataset, tmp_path):
    "It gains on its own events, repeats itself, and leaves the random numbers of the session alone."
    dataset = IceCubeDataset(tiny_dataset)
    models = []
    for _ in range(2):
        model = HierarchicalTransformer.from_pretrained("small")
        with torch.random.fork_rng([]):
            torch.manual_seed(5)
            model.t2.sky = SkyDensity(96)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        state = torch.random.get_rng_state()
        fit_density(model, dataset, epochs=40, progress=False)
        assert torch.equal(state, torch.random.get_rng_state())
        models.append(model)
    changed = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(name.startswith("t2.sky.") for name in changed)
    for p, q in zip(*(m.parameters() for m in models), strict=True): assert torch.equal(p, q)
    model.save(tmp_path / "m.safetensors")
    again = HierarchicalTransformer.load(tmp_path / "m.safetensors")
    pooled, vector, true = pooled_events(again, dataset, progress=False)
    with torch.no_grad(): density = again.t2.sky(pooled, vector).log_density(true)
    assert density.mean() > -vmf_loss(vector, true)


def test_maps_agree_with_the_density():
    mixture = random_mixture(3)
    for k, skymap in enumerate(mixture_maps(mixture, events=["a", "b", "c"])):
        expected = mixture[k].log_density(torch.from_numpy(skymap.directions())[None])[0].exp().numpy()
        assert np.abs(skymap.density - expected).max() < 0.02 * expected.max()
        assert skymap.frame == "detector" and skymap.event == "abc"[k]
        assert skymap.area(0.9) == pytest.approx(float(mixture[k].area(0.9, n=256)), rel=0.03)


def test_skymap_command(tiny_dataset, tmp_path, capsys):
    "One file per event, in the sky where the time is known; or one table."
    pytest.importorskip("astropy_healpix")
    from iceaggr.skymap import SkyMap
    data, maps = ["--data", str(tiny_dataset), "--run", "small"], tmp_path / "maps"
    ids = IceCubeDataset(tiny_dataset).event_ids
    times = tmp_path / "times.csv"
    pd.DataFrame({"event_id": ids[:2], "mjd": 58_000.5}).to_csv(times, index=False)
    assert main(["skymap", *data, "--out", str(maps), "--times", str(times)]) == 0
    said = capsys.readouterr().out
    assert f"{len(ids)} sky maps" in said
    assert f"2 in right ascension and declination, {len(ids) - 2} in detector coordinates" in said
    first, last = (SkyMap.read(maps / f"event_{i}.fits") for i in (ids[0], ids[-1]))
    assert (first.frame, last.frame) == ("icrs", "detector") and first.mjd == 58_000.5
    assert first.integral() == pytest.approx(1, abs=1e-4)
    table = tmp_path / "regions.csv"
    one = ["--event", str(ids[0]), "--mjd", "58000.5"]
    assert main(["skymap", *data, *one, "--out", str(table)]) == 0
    row = pd.read_csv(table).iloc[0]
    assert row.frame == "icrs" and row.area_90 == pytest.approx(first.area(0.9), rel=1e-3)
    assert main(["skymap", *data, "--mjd", "58000.5", "--out", str(maps)]) == 2
    assert "time of one event" in capsys.readouterr().err


def test_times_that_do_not_fit(tmp_path):
    table = density_table(random_mixture(2))
    table = pd.concat([pd.DataFrame({"event_id": [1, 2], "azimuth": 0.0}), table], axis=1)
    for times, word in ((pd.DataFrame({"event_id": [1, 1], "mjd": 5.0}), "event 1 has several times"),
                        (pd.DataFrame({"event_id": [1]}), "no column mjd")):
        with pytest.raises(ValueError, match=word): write_maps(table, tmp_path, times, progress=False)
    runs = table.assign(event_id=1)
    runs.insert(0, "run", ["a/1", "b/1"])
    with pytest.raises(ValueError, match="several runs"):
        write_maps(runs, tmp_path, pd.DataFrame({"event_id": [1], "mjd": 5.0}), progress=False)
    assert write_maps(runs, tmp_path / "maps", progress=False) == 0
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"event_a_1_1.fits", "event_b_1_1.fits"}
