"""Simulation, impulse and frequency response: consistent with each other and with independent computations."""

from __future__ import annotations

import control
import numpy as np
import pytest
import torch

from hf_compressm.errors import ConfigurationError, DimensionError, NotFiniteError, UnstableSystemError
from hf_compressm.systems import DiagonalLTI

from .oracles import complex_response, numpy_matrices, random_system, real_matrices, transfer

OMEGA = torch.tensor([-3.0, -0.7, 0.0, 1e-3, 0.4, 2.0])


def simulated(system: DiagonalLTI, u: np.ndarray, state: np.ndarray) -> np.ndarray:
    """`h[t] = A h[t-1] + B u[t], y[t] = C h[t] + D u[t]`, one step at a time with dense matrices."""
    A, B, C = numpy_matrices(system)
    outputs = []
    for step in u:
        state = A @ state + B @ step
        outputs.append(C @ state + system.D.numpy() @ step)
    return np.stack(outputs)


def test_simulation_is_the_recursion() -> None:
    system = random_system("mimo", 0)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(20, 2)) + 1j * rng.normal(size=(20, 2))
    state = rng.normal(size=12) + 1j * rng.normal(size=12)
    found = system.simulate(torch.from_numpy(u), torch.from_numpy(state))
    assert np.allclose(found, simulated(system, u, state), rtol=1e-12, atol=1e-12)
    found = system.simulate(torch.from_numpy(u))
    assert np.allclose(found, simulated(system, u, np.zeros(12)), rtol=1e-12, atol=1e-12)


def test_the_input_reaches_the_output_in_the_same_step() -> None:
    system = DiagonalLTI(torch.tensor([0.5]), torch.tensor([[2.0]]), torch.tensor([[3.0]]), torch.tensor([[10.0]]))
    u = torch.tensor([[1.0], [0.0], [0.0]])
    assert system.simulate(u).real.flatten().tolist() == [16.0, 3.0, 1.5]
    assert system.impulse_response(3).real.flatten().tolist() == [16.0, 3.0, 1.5]
    assert system.simulate(u, torch.tensor([4.0])).real.flatten().tolist() == [22.0, 6.0, 3.0]


def test_a_real_input_to_a_batch_of_systems() -> None:
    system = random_system("mimo", 1, batch=(3,))
    u = torch.randn(15, 2)
    y = system.simulate(u)
    assert y.shape == (3, 15, 3)
    single = DiagonalLTI(system.lam[1], system.B[1], system.C[1], system.D[1])
    assert torch.allclose(y[1], single.simulate(u))
    per_system = torch.randn(3, 15, 2)
    assert torch.allclose(system.simulate(per_system)[2], system.simulate(per_system[2])[2])
    several_inputs = torch.randn(7, 1, 15, 2)
    assert system.simulate(several_inputs).shape == (7, 3, 15, 3)
    assert system.simulate(torch.randn(0, 2)).shape == (3, 0, 3)


def test_impulse_response_is_a_simulation() -> None:
    system = random_system("mimo", 2)
    response = system.impulse_response(25)
    assert response.shape == (25, 3, 2)
    for channel in range(2):
        u = torch.zeros(25, 2)
        u[0, channel] = 1
        assert torch.allclose(response[:, :, channel], system.simulate(u), rtol=1e-10, atol=1e-12)


def test_impulse_response_of_a_pole_at_zero() -> None:
    system = DiagonalLTI(torch.zeros(1), torch.ones(1, 1), torch.ones(1, 1))
    assert system.impulse_response(3).real.flatten().tolist() == [1.0, 0.0, 0.0]


def test_frequency_response_is_the_transform_of_the_impulse_response() -> None:
    lam = torch.tensor([0.5, -0.3 + 0.4j, 0.7j], dtype=torch.complex128)
    system = DiagonalLTI(lam, torch.randn(3, 2) + 0j, torch.randn(4, 3) + 1j, torch.randn(4, 2))
    steps = torch.arange(200)
    kernel = torch.exp(-1j * OMEGA[:, None].double() * steps)
    expected = torch.einsum("wt,toh->woh", kernel, system.impulse_response(200))
    assert torch.allclose(system.frequency_response(OMEGA), expected, rtol=1e-10)


@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
def test_frequency_response_agrees_with_a_dense_solve(time_domain: str) -> None:
    system = random_system("mimo", 3, time_domain)
    expected = transfer(system, OMEGA.double().numpy()) + system.D.numpy()
    found = system.frequency_response(OMEGA)
    assert found.shape == (6, 3, 2)
    assert np.abs(found.numpy() - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("time_domain", ["discrete", "continuous"])
def test_frequency_response_agrees_with_python_control(time_domain: str) -> None:
    """A control text's input acts one step later: its transfer function, without D, is ours divided by z."""
    system = random_system("mimo", 0, time_domain)
    system = DiagonalLTI(system.lam, system.B, system.C, time_domain=time_domain)
    omega = np.array([-1.0, 1e-3, 0.4, 2.0])
    A, B, C = real_matrices(system)
    reference = control.ss(A, B, C, np.zeros((C.shape[0], B.shape[1])), True if time_domain == "discrete" else 0)
    z = np.exp(1j * omega) if time_domain == "discrete" else 1j * omega
    expected = complex_response(np.moveaxis(reference(z), -1, 0))
    if time_domain == "discrete":
        expected = z[:, None, None] * expected
    found = system.frequency_response(torch.from_numpy(omega)).numpy()
    assert np.abs(found - expected).max() < 1e-9 * np.abs(expected).max()


def test_every_system_of_a_batch_may_have_its_own_frequencies() -> None:
    system = random_system("mimo", 4, batch=(3,))
    shared = system.frequency_response(OMEGA)
    own = system.frequency_response(torch.stack([OMEGA, OMEGA.flip(0), OMEGA]))
    assert shared.shape == own.shape == (3, 6, 3, 2)
    assert torch.allclose(own[1], shared[1].flip(0))


def test_gramians_are_energies_of_simulations() -> None:
    """Q from the output that a state releases, P from the states that white input reaches."""
    lam = torch.tensor([0.6, 0.5j, -0.4 + 0.3j], dtype=torch.complex128)
    system = DiagonalLTI(lam, torch.randn(3, 2) + 0j, torch.randn(2, 3) * 1j)
    powers = torch.linalg.vander(lam, N=150)
    released = torch.einsum("on,nt->ton", system.C, powers)
    assert torch.allclose(torch.einsum("ton,tom->nm", released.conj(), released), system.observability_gramian())
    reached = torch.einsum("nt,nh->tnh", powers, system.B)
    assert torch.allclose(torch.einsum("tnh,tmh->nm", reached, reached.conj()), system.controllability_gramian())


def test_everything_is_complex128_and_keeps_its_gradient() -> None:
    lam = torch.tensor([0.5], requires_grad=True)
    system = DiagonalLTI(lam, torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.int32))
    assert {system.lam.dtype, system.B.dtype, system.C.dtype} == {torch.complex128}
    assert system.D is None
    system.simulate(torch.ones(3, 1)).real.sum().backward()
    assert lam.grad.item() == pytest.approx(3.0)  # y = 1 + (1 + lam) + (1 + lam + lam^2)


def test_properties() -> None:
    system = random_system("mimo", 0, batch=(2, 5))
    assert system.order == 12
    assert system.batch_shape == (2, 5)
    assert system.is_stable()
    system.require_stable()
    assert system != random_system("mimo", 0, batch=(2, 5))  # identity, not an ambiguous comparison of tensors
    assert hash(system) is not None


def test_stability_is_that_of_the_time_domain() -> None:
    unstable = DiagonalLTI(torch.tensor([0.5, -1.5]), torch.ones(2, 1), torch.ones(1, 2))
    assert not unstable.is_stable()
    with pytest.raises(UnstableSystemError, match=r"lam\[1\] = -1\.5"):
        unstable.require_stable()
    decaying = DiagonalLTI(torch.tensor([-0.5, -1.5]), torch.ones(2, 1), torch.ones(1, 2), time_domain="continuous")
    assert decaying.is_stable()


class TestArguments:
    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((), (1, 1), (1, 1)), "lam, B and C have shapes"),
            (((0,), (0, 1), (1, 0)), "N >= 1"),
            (((3,), (3,), (1, 3)), "lam, B and C have shapes"),
            (((3,), (2, 1), (1, 3)), r"B has shape \(2, 1\).*must be \(3, 1\)"),
            (((3,), (3, 1), (1, 4)), r"C has shape \(1, 4\).*must be \(1, 3\)"),
            (((2, 3), (3, 1), (2, 1, 3)), r"B has shape \(3, 1\).*must be \(2, 3, 1\)"),
            (((3,), (3, 2), (4, 3), (2, 4)), r"D has shape \(2, 4\).*2 inputs and 4 outputs.*must be \(4, 2\)"),
        ],
    )
    def test_shapes(self, shapes: tuple, message: str) -> None:
        with pytest.raises(DimensionError, match=message):
            DiagonalLTI(*(torch.zeros(shape) for shape in shapes))

    @pytest.mark.parametrize("name", ["lam", "B", "C", "D"])
    def test_not_finite(self, name: str) -> None:
        tensors = {"lam": torch.zeros(1), "B": torch.ones(1, 1), "C": torch.ones(1, 1), "D": torch.ones(1, 1)}
        tensors[name] = tensors[name] * float("nan")
        with pytest.raises(NotFiniteError, match=f"{name} has 1 of 1"):
            DiagonalLTI(**tensors)

    def test_time_domain(self) -> None:
        with pytest.raises(ConfigurationError, match="time_domain is 'z'"):
            DiagonalLTI(torch.zeros(1), torch.ones(1, 1), torch.ones(1, 1), time_domain="z")

    @pytest.mark.parametrize("call", [lambda s: s.impulse_response(3), lambda s: s.simulate(torch.ones(3, 1))])
    def test_discrete_only(self, call) -> None:
        system = DiagonalLTI(-torch.ones(1), torch.ones(1, 1), torch.ones(1, 1), time_domain="continuous")
        with pytest.raises(ConfigurationError, match="needs a discrete-time system"):
            call(system)

    def test_frequencies(self) -> None:
        system = random_system("siso", 0, batch=(2,))
        for omega in (torch.zeros(()), torch.zeros(3, 5), torch.zeros(4, dtype=torch.complex64)):
            with pytest.raises(DimensionError, match="omega has dtype"):
                system.frequency_response(omega)
        with pytest.raises(NotFiniteError, match="omega"):
            system.frequency_response(torch.tensor([float("inf")]))

    def test_signals(self) -> None:
        system = random_system("mimo", 0)
        with pytest.raises(DimensionError, match=r"u has shape \(5, 3\); it must be \(..., time, 2\)"):
            system.simulate(torch.zeros(5, 3))
        with pytest.raises(DimensionError, match="initial_state has shape"):
            system.simulate(torch.zeros(5, 2), torch.zeros(11))
        with pytest.raises(DimensionError, match="length is 0"):
            system.impulse_response(0)


def test_large_finite_entries_are_finite() -> None:
    huge = torch.full((3, 1), 1e308, dtype=torch.float64)
    assert DiagonalLTI(torch.full((3,), 0.5), huge, huge.mT).order == 3
