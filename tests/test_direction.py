"""Directions: corners of the sphere, precision, gradients, and the von Mises-Fisher distribution."""
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from iceaggr.direction import (
    angles_to_vector,
    angular_error,
    angular_error_angles,
    mean_angular_error,
    vector_to_angles,
    vmf_log_norm,
    vmf_loss,
    vmf_quantile,
    vmf_resultant,
    vmf_sample,
)

CORNERS = torch.tensor([
    [1., -1e-9, 0], [1, -0., 0], [1, 0, 0], [-1, -0., 0],
    [0, 0, 1], [0, 0, -1], [1e-6, 0, -1], [0, 0, 0],
])


def random_units(*shape, seed=0):
    "Isotropic unit vectors in float64."
    v = torch.randn(*shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(v, dim=-1)


def density_of_angle(psi, kappa):
    "Density of the angle to the mean direction [1 / rad]."
    return 2 * math.pi * math.sin(psi) * math.exp(vmf_log_norm(kappa).item() + kappa * math.cos(psi))


def reach(kappa):
    "Angle beyond which the density vanishes."
    return min(math.pi, 12 / math.sqrt(max(kappa, 1e-9)))


def test_axes_and_broadcasting():
    "Up, east and north; angles of different shapes are broadcast."
    found = angles_to_vector([0., 0., math.pi / 2], [0., math.pi / 2, math.pi / 2])
    expected = torch.tensor([[0., 0, 1], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    assert torch.allclose(found, expected, atol=1e-15)
    assert angles_to_vector(torch.zeros(4, 2), torch.zeros(2)).shape == (4, 2, 3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_round_trip(dtype, tolerance, length):
    "Angles come back from vectors of any length."
    rng = torch.Generator().manual_seed(0)
    azimuth = torch.rand(10_000, generator=rng, dtype=dtype) * 2 * math.pi
    zenith = torch.rand(10_000, generator=rng, dtype=dtype) * math.pi
    azimuth_back, zenith_back = vector_to_angles(angles_to_vector(azimuth, zenith) * length)
    turn = torch.remainder(azimuth_back - azimuth + math.pi, 2 * math.pi) - math.pi
    assert (turn * zenith.sin()).abs().max() < tolerance
    assert (zenith_back - zenith).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrap_poles_and_zero_vector(dtype):
    "Angles stay in their ranges at the wrap, at the poles and for the zero vector."
    azimuth, zenith = vector_to_angles(CORNERS.to(dtype))
    assert ((azimuth.double() >= 0) & (azimuth.double() < 2 * math.pi)).all()
    assert ((zenith >= 0) & (zenith.double() <= math.pi)).all()
    assert zenith[7] == 0
    if dtype == torch.float64: assert zenith[6] < math.pi            # one microradian from the pole


def test_gradient_is_finite_at_corners():
    "No NaN in the gradient of the angles at the poles and for the zero vector."
    v = CORNERS.clone().requires_grad_()
    azimuth, zenith = vector_to_angles(v)
    (azimuth.sum() + zenith.sum()).backward()
    assert torch.isfinite(v.grad).all()


def test_gradient_of_the_angle_at_0_and_pi():
    "No NaN where two directions coincide or are opposite."
    a = torch.tensor([[0., 0, 1], [0, 0, -1], [1, 1, 1]], requires_grad=True)
    angular_error(a, torch.tensor([0., 0, 1])).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_gradients_agree_with_finite_differences():
    "Gradients of the angle between directions and of the angles of a vector."
    a, b = random_units(2, 8).requires_grad_()
    assert torch.autograd.gradcheck(angular_error, (a, b))
    assert torch.autograd.gradcheck(vector_to_angles, (a,))


def test_known_angles():
    "Equal, opposite, and across the wrap of the azimuth."
    assert angular_error([0., 0, 1], [0, 0, 5]) == 0
    assert angular_error([0., 0, 1], [0, 0, -2]) == math.pi
    assert abs(angular_error_angles(0.1, math.pi / 2, 2 * math.pi - 0.1, math.pi / 2) - 0.2) < 1e-14


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor, pd.Series, list])
def test_score_of_arrays_tensors_series_and_lists(kind):
    "The score is a float, whatever holds the angles."
    truth = [kind([0.1, 0.0]), kind([math.pi / 2, 0.0])]
    predicted = [kind([2 * math.pi - 0.1, 1.0]), kind([math.pi / 2, math.pi / 2])]
    score = mean_angular_error(*truth, *predicted)
    assert type(score) is float
    assert score == pytest.approx((0.2 + math.pi / 2) / 2, abs=1e-6)


def test_score_goes_by_position_not_by_index():
    "A Series is an array: its index plays no part."
    angles = pd.Series([0.1, 2.0], index=[7, 3])
    assert mean_angular_error(angles, angles, angles.to_numpy(), angles.reset_index(drop=True)) == 0


@pytest.mark.parametrize("predicted", [[0.1], [0.1, np.nan]])
def test_score_refuses_other_shapes_and_nan(predicted):
    "Neither broadcasting nor NaN gives a score."
    with pytest.raises(ValueError, match="shape|finite"):
        mean_angular_error([0.1, 0.2], [0.1, 0.2], predicted, predicted)
    with pytest.raises(ValueError, match="no events"): mean_angular_error([], [], [], [])


@pytest.mark.parametrize("kappa", [0., 1e-8, 1e-3, 0.0999, 0.1001, 1., 20., 1e3, 1e5])
def test_density_integrates_to_one(kappa):
    "By SciPy's quadrature over the sphere."
    total, _ = quad(density_of_angle, 0, reach(kappa), args=(kappa,), epsabs=1e-12)
    assert abs(total - 1) < 1e-9


def test_log_norm_in_float32_and_its_gradient():
    "float32 agrees with float64; the gradient is 1 / kappa - coth(kappa)."
    kappa = torch.logspace(-8, 6, 300, dtype=torch.float64, requires_grad=True)
    single = vmf_log_norm(kappa.detach().float()).double()
    assert ((single - vmf_log_norm(kappa)) / (1 + kappa)).abs().max() < 5e-7
    slope, = torch.autograd.grad(vmf_log_norm(kappa).sum(), kappa)
    closed = torch.where(kappa < 1e-3, -kappa / 3, 1 / kappa - 1 / torch.tanh(kappa))
    assert (slope - closed).abs().max() < 1e-9


@pytest.mark.parametrize("kappa", [0.01, 0.5, 0.999, 1.001, 10., 1e3, 1e4, 1e6])
def test_loss_in_float32_against_the_textbook_form(kappa):
    "The stable form agrees with -log C3 - kappa cos(psi) in float64."
    target = random_units(500)
    noise = torch.randn(500, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mu = torch.nn.functional.normalize(target + noise / math.sqrt(kappa + 1), dim=-1)
    textbook = -(vmf_log_norm(kappa) + kappa * (mu * target).sum(-1))
    single = vmf_loss((mu * kappa).float(), target.float(), "none").double()
    tolerance = 1.1e-3 if kappa >= 1e6 else 1e-4
    assert ((single - textbook).abs() / (1 + textbook.abs())).max() < tolerance


def test_gradient_of_the_loss():
    "Finite differences, for lengths from 0.001 to 100."
    v = random_units(12, seed=2) * torch.logspace(-3, 2, 12, dtype=torch.float64)[:, None]
    target = random_units(12, seed=3)
    assert torch.autograd.gradcheck(lambda v: vmf_loss(v, target, "none"), (v.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_at_extreme_vectors(dtype):
    "Finite for vectors of length 0 to 1e8; the gradient at 0 is minus the target."
    target = random_units(5).to(dtype)
    v = (target * torch.tensor([0, 1e-20, 1e4, -1e4, 1e8], dtype=dtype)[:, None]).requires_grad_()
    loss = vmf_loss(v, target, "none")
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(v.grad).all()
    assert torch.allclose(v.grad[0], -target[0])
    uniform = vmf_loss(torch.zeros(3), target[0].float()).item()
    assert math.isclose(uniform, math.log(4 * math.pi), rel_tol=1e-6)


def test_loss_refuses_an_unknown_reduction():
    "The message names the choices."
    with pytest.raises(ValueError, match="choose 'mean', 'sum' or 'none'"): vmf_loss(CORNERS, CORNERS, "max")


@pytest.mark.parametrize("degrees", [1, 3, 10])
def test_best_kappa(degrees):
    "For an error psi that cannot be reduced the best kappa is 2 / psi^2."
    kappa = torch.logspace(-1, 5, 300, dtype=torch.float64)
    vector = kappa[:, None] * angles_to_vector(0., math.radians(degrees))
    loss = vmf_loss(vector, angles_to_vector(0., 0.), "none")
    assert abs(math.log(kappa[loss.argmin()] * math.radians(degrees) ** 2 / 2)) < 0.06


@pytest.mark.parametrize("kappa", [0., 1e-6, 0.0999, 0.1001, 2., 30., 1e3])
def test_resultant_is_the_mean_cosine(kappa):
    "By quadrature."
    def cosine(psi): return math.cos(psi) * density_of_angle(psi, kappa)
    mean, _ = quad(cosine, 0, reach(kappa), epsabs=1e-13)
    assert abs(vmf_resultant(kappa).item() - mean) < 1e-10


def test_loss_with_a_resultant_is_the_mean_loss():
    "One target with a resultant equals the mean over six possible directions."
    shifted = random_units(6, 40, seed=4) + torch.tensor([0., 0, 1])
    several = torch.nn.functional.normalize(shifted, dim=-1)
    v = random_units(40, seed=5) * torch.logspace(-3, 4, 40, dtype=torch.float64)[:, None]
    resultant = several.mean(0).norm(dim=-1)
    target = several.mean(0) / resultant[:, None]
    found = vmf_loss(v, target, "none", resultant)
    expected = torch.stack([vmf_loss(v, s, "none") for s in several]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    single = vmf_loss(v.float(), target.float(), "none", resultant.float())
    torch.testing.assert_close(single.double(), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kappa", [1e-9, 0.1, 3., 100., 1e4])
@pytest.mark.parametrize("probability", [0.5, 0.68, 0.9])
def test_quantile(kappa, probability):
    "The cone holds its probability, and a root finder gives the same radius."
    def inside(radius): return quad(density_of_angle, 0, radius, args=(kappa,), epsabs=1e-13)[0]
    radius = vmf_quantile(kappa, probability).item()
    assert abs(inside(radius) - probability) < 1e-9
    solved = brentq(lambda x: inside(x) - probability, radius / 2, min(2 * radius, math.pi))
    assert abs(solved / radius - 1) < 1e-6


def test_quantile_over_all_kappas():
    "float32 agrees with float64; radii fall with kappa; probabilities 0 and 1."
    kappa = torch.logspace(-9, 9, 400, dtype=torch.float64)
    assert ((vmf_quantile(kappa.float()).double() / vmf_quantile(kappa)) - 1).abs().max() < 1e-5
    assert (vmf_quantile(kappa).diff() <= 0).all()
    assert vmf_quantile(kappa, 1.)[0] == math.pi
    assert (vmf_quantile(kappa, 0.) == 0).all()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"): vmf_quantile(kappa, 1.1)


@pytest.mark.parametrize("kappa", [1e-3, 2.0, 200.0, 1e5])
def test_samples(kappa):
    "Unit vectors with 68 % inside r68 and the right mean cosine."
    mu = angles_to_vector(1.0, 2.0)
    directions = vmf_sample(mu, kappa, 20_000, generator=torch.Generator().manual_seed(1))
    assert (directions.norm(dim=-1) - 1).abs().max() < 1e-12
    inside = (angular_error(directions, mu) <= vmf_quantile(kappa)).double().mean()
    assert abs(inside - 0.68) < 0.01               # three standard deviations of the binomial
    mean_cosine = (directions.double() @ mu.double()).mean()
    assert abs(mean_cosine - (1 / math.tanh(kappa) - 1 / kappa)) < 0.02


def test_shape_of_samples():
    "Samples come first."
    assert vmf_sample(torch.randn(5, 3), torch.ones(5), 4).shape == (4, 5, 3)


# Gradients where a length or a square root vanishes

AXES = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(1, 3)])
UP = torch.tensor([0., 0., 1.])


FUNCTIONS = {
    "loss": lambda v: vmf_loss(v, UP.to(v), "sum"),
    "loss of a blurred target": lambda v: vmf_loss(v, -UP.to(v), "sum", torch.full((7,), 0.5).to(v)),
    "azimuth": lambda v: vector_to_angles(v)[0].sum(),
    "zenith": lambda v: vector_to_angles(v)[1].sum(),
    "angle": lambda v: angular_error(v, UP.to(v)).sum(),
    "angle to itself": lambda v: angular_error(v, v.detach()).sum(),
    "back and forth": lambda v: angles_to_vector(*vector_to_angles(v)).sum(),
    "sample": lambda v: vmf_sample(v, torch.ones(7).to(v), 3).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1., 1e4, 1e18])
def test_gradient_along_the_axes_and_at_zero(name, dtype, size):
    v = (AXES * size).to(dtype).requires_grad_()
    value = FUNCTIONS[name](v)
    value.backward()
    assert value.isfinite() and v.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_the_loss_straight_up_is_that_nearby(dtype):
    for z in (0.3, -0.3, 20., -20.):
        exact, near = (torch.tensor([x, 0., z], dtype=dtype, requires_grad=True) for x in (0., 1e-4))
        for v in (exact, near): vmf_loss(v, torch.tensor([0.6, 0., 0.8], dtype=dtype)).backward()
        assert torch.allclose(exact.grad, near.grad, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kappa", [0., 1e-30, 0.1, 1., 50., 1e5, 1e18])
def test_gradient_with_respect_to_kappa(kappa, dtype):
    "Also of the cones that hold nothing and everything."
    functions = [vmf_log_norm, vmf_resultant]
    functions += [lambda k, p=p: vmf_quantile(k, p) for p in (0., 0.68, 1.)]
    for function in functions:
        k = torch.tensor(kappa, dtype=dtype, requires_grad=True)
        value = function(k)
        value.backward()
        assert value.isfinite() and k.grad.isfinite()


@pytest.mark.parametrize("size", [0., 1e-30, 1.])
def test_gradient_of_the_head_along_the_axes(size):
    "Of the length that T2 gives its vectors, and of the calibration."
    from iceaggr.event_transformer import EventTransformer
    t2 = EventTransformer(d_model=32, n_heads=2, n_layers=1)
    t2.calibration.copy_(torch.tensor([0.9, 1.1]))
    t2.head, t2.confidence = torch.nn.Identity(), torch.nn.Linear(3, 1)
    v = (AXES * size).requires_grad_()
    vmf_loss(t2.calibrated(t2.vector_of(v)), UP.expand(7, 3)).backward()
    assert v.grad.isfinite().all()
