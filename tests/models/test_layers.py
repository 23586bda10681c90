"""The LRU and S4D layers against independent oracles."""

from __future__ import annotations

import math

import control
import numpy as np
import pytest
import scipy.signal
import torch

from hf_compressm.models import LRUConfig, S4DConfig
from hf_compressm.models import sequence as lru
from hf_compressm.models import sequence as s4d
from hf_compressm.models.sequence.modeling_lru import LRU
from hf_compressm.models.sequence.modeling_s4d import S4D
from hf_compressm.models.sequence.recurrent_cache import RecurrentCache
from hf_compressm.systems import DiagonalLTI


def make_lru(hidden_size: int = 5, state_size: int = 12) -> LRU:
    layer = LRU(LRUConfig(hidden_size=hidden_size, state_size=state_size), 0)
    layer.reset_parameters()
    return layer


def make_s4d(discretization: str = "zoh", poles: str = "lin", hidden_size: int = 3, state_size: int = 6) -> S4D:
    config = S4DConfig(hidden_size=hidden_size, state_size=state_size, init=poles, discretization=discretization)
    layer = S4D(config, 0)
    layer.reset_parameters()
    return layer


@torch.no_grad()
def test_lru_is_its_published_recurrence() -> None:
    layer = make_lru()
    u = torch.randn(2, 300, 5)
    lam = np.exp(-np.exp(layer.nu_log.double().numpy()) + 1j * np.exp(layer.theta_log.double().numpy()))
    B = np.exp(layer.gamma_log.double().numpy())[:, None] * (layer.B.double().numpy() @ [1, 1j])
    C = layer.C.double().numpy() @ [1, 1j]
    for sequence, found in zip(u.double().numpy(), layer(u)):
        h = np.zeros(12, complex)
        for step, output in zip(sequence, found.numpy()):
            h = lam * h + B @ step
            np.testing.assert_allclose(output, (C @ h).real + layer.D.numpy() * step, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lru_against_python_control() -> None:
    layer = make_lru(hidden_size=2, state_size=4)
    lam, B, C = layer.system()
    # A complex system with real part of the output is a real one of twice the size.
    real = lambda z: np.block([[z.real, -z.imag], [z.imag, z.real]])  # noqa: E731
    A, B2 = real(np.diag(lam.numpy()).astype(complex)), np.vstack([B.numpy().real, B.numpy().imag])
    C2 = np.hstack([C.numpy().real, -C.numpy().imag])
    # control's state is one step late: y[t] = C h[t] = C A x[t] + C B u[t] with x[t] = h[t-1].
    system = control.ss(A, B2, C2 @ A, C2 @ B2 + np.diag(layer.D.numpy()), True)
    u = torch.randn(1, 200, 2)
    expected = control.forced_response(system, inputs=u[0].T.numpy()).outputs
    np.testing.assert_allclose(layer(u)[0].T.numpy(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_lru_starts_on_its_ring_with_states_of_the_power_of_the_input() -> None:
    layer = LRU(LRUConfig(hidden_size=64, state_size=2000, r_min=0.4, r_max=0.8, max_phase=math.pi / 2), 0)
    layer.reset_parameters()
    lam, B, _ = layer.system()
    assert lam.abs().min() >= 0.4 - 1e-6
    assert lam.abs().max() <= 0.8 + 1e-6
    # Uniform on a ring: the squared radius is uniform.
    assert abs((lam.abs() ** 2).mean() - (0.4**2 + 0.8**2) / 2) < 0.01
    assert 0 < lam.angle().min() < 0.01
    assert math.pi / 2 - 0.01 < lam.angle().max() <= math.pi / 2
    power = (B.abs() ** 2).sum(1) / (1 - lam.abs() ** 2)
    assert abs(power.mean() - 1) < 0.02


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("poles", ["lin", "inv", "real"])
@torch.no_grad()
def test_s4d_is_the_discretised_system_of_the_paper(discretization: str, poles: str) -> None:
    layer = make_s4d(discretization, poles)
    u = torch.randn(1, 400, 3)
    found = layer(u)
    A = -np.exp(layer.A_real_log.double().numpy()) + 1j * layer.A_imag.double().numpy()
    C = layer.C.double().numpy() @ [1, 1j]
    for channel in range(3):
        # The conjugate half is written out: 2 Re(C h) is C h + conj(C h).
        poles_, readout = np.r_[A[channel], A[channel].conj()], np.r_[C[channel], C[channel].conj()]
        continuous = np.diag(poles_), np.ones((12, 1)), readout[None], np.zeros((1, 1))
        dt = math.exp(layer.log_dt[channel].item())
        Ad, Bd, *_ = scipy.signal.cont2discrete(continuous, dt, method="zoh" if discretization == "zoh" else "bilinear")
        if discretization == "bilinear":
            Bd = np.linalg.solve(np.eye(12) - dt / 2 * continuous[0], dt * continuous[1])
        h, expected = np.zeros(12, complex), []
        for step in u[0, :, channel].double().numpy():
            h = Ad @ h + Bd[:, 0] * step
            expected.append((readout @ h).real + layer.D[channel].item() * step)
        np.testing.assert_allclose(found[0, :, channel].numpy(), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_s4d_starts_with_the_published_poles() -> None:
    n = np.arange(6)
    expected = {
        "lin": -0.5 + 1j * np.pi * n,
        "inv": -0.5 + 1j * 12 / np.pi * (12 / (2 * n + 1) - 1),
        "real": -(n + 1.0),
    }
    for name, values in expected.items():
        layer = make_s4d(poles=name)
        A = -np.exp(layer.A_real_log.double().numpy()) + 1j * layer.A_imag.double().numpy()
        np.testing.assert_allclose(A, np.broadcast_to(values, (3, 6)), rtol=1e-6)
    dt = make_s4d(hidden_size=4000, state_size=1)
    assert abs(dt.log_dt.mean() - math.log(0.01)) < 0.05
    assert math.log(0.001) <= dt.log_dt.min()
    assert dt.log_dt.max() <= math.log(0.1)


@pytest.mark.parametrize("make", [make_lru, make_s4d])
@torch.no_grad()
def test_the_plain_torch_form_of_a_layer_equals_the_library(make, monkeypatch) -> None:
    layer = make()
    u, mask = torch.randn(2, 100, layer.hidden_size), torch.rand(2, 100) > 0.1
    cache = RecurrentCache(1)
    fast = [
        layer(u, mask),
        layer(u[:, :60], None, cache),
        layer(u[:, 60:61], None, cache),
        layer(u[:, 61:], None, cache),
    ]
    monkeypatch.setattr(lru.modeling_lru, "diagonal_recurrence", None)
    monkeypatch.setattr(s4d.modeling_s4d, "channel_systems", None)
    cache.reset()
    slow = [
        layer(u, mask),
        layer(u[:, :60], None, cache),
        layer(u[:, 60:61], None, cache),
        layer(u[:, 61:], None, cache),
    ]
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_recurrence_convolution_and_system_of_an_s4d_layer_agree() -> None:
    layer = make_s4d()
    u = torch.randn(2, 500, 3)
    convolution = layer(u)
    cache = RecurrentCache(1)
    recurrence = torch.cat([layer(step, None, cache) for step in u.split(1, 1)], 1)
    torch.testing.assert_close(recurrence, convolution, atol=1e-4, rtol=1e-4)
    lam, C = layer.system()
    system = DiagonalLTI(lam, torch.ones(3, 6, 1), C.unsqueeze(1), layer.D.view(3, 1, 1))
    simulated = system.simulate(u.transpose(1, 2).unsqueeze(-1)).real[..., 0].transpose(1, 2)
    torch.testing.assert_close(convolution.double(), simulated, atol=1e-4, rtol=1e-4)
