"""Hankel singular values against 80-digit arithmetic, SLICOT, pyMOR, and the Hankel matrix of a simulation."""

from __future__ import annotations

import control
import numpy as np
import pytest
import slycot
import torch
from pymor.core.logger import set_log_levels
from pymor.models.iosys import LTIModel

from hf_compressm.errors import ConfigurationError, DimensionError, NotFiniteError, UnstableSystemError
from hf_compressm.systems import DiagonalLTI, HankelDecomposition, hankel_decomposition, hankel_singular_values

from .oracles import KINDS, exact_hankel_singular_values, hankel_matrix, random_system, real_matrices

TIME_DOMAINS = ["discrete", "continuous"]
set_log_levels({"pymor": "ERROR"})


def relative_error(found: torch.Tensor, expected: np.ndarray, above: float) -> float:
    leading = expected > above * expected[0]
    return float((np.abs(found.numpy() - expected)[leading] / expected[leading]).max())


def from_gramians(system: DiagonalLTI) -> torch.Tensor:
    return hankel_singular_values(system.controllability_gramian(), system.observability_gramian())


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_agree_with_80_digits(kind: str, time_domain: str) -> None:
    for seed in range(4):
        system = random_system(kind, seed, time_domain)
        exact = exact_hankel_singular_values(system)
        assert relative_error(system.hankel_singular_values(), exact, above=1e-6) < 1e-11
        assert relative_error(system.hankel_singular_values(), exact, above=1e-12) < 1e-8
        assert relative_error(from_gramians(system), exact, above=1e-6) < 1e-6


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", KINDS)
def test_hundreds_of_systems_agree_with_each_other(kind: str, time_domain: str) -> None:
    """Both ways to the same numbers, on batches: the one was just compared with the exact answer."""
    system = random_system(kind, seed=7, time_domain=time_domain, batch=(40,))
    direct, formed = system.hankel_singular_values(), from_gramians(system)
    for sigma in (direct, formed):
        assert sigma.shape == (40, system.order)
        assert sigma.dtype == torch.float64
        assert torch.isfinite(sigma).all()
        assert (sigma >= 0).all()
        assert (sigma.diff(dim=-1) <= 0).all()
    leading = direct > 1e-5 * direct[:, :1]
    assert ((formed - direct).abs() / direct)[leading].max() < 1e-6
    # The absolute error is rounding of the largest value, for the small ones too.
    assert ((formed - direct).abs() / direct[:, :1]).max() < 1e-7


@pytest.mark.parametrize("seed", range(3))
def test_are_the_singular_values_of_the_hankel_matrix(seed: int) -> None:
    """From first principles: how past inputs map to future outputs, measured on the library's own simulation."""
    generator = torch.Generator().manual_seed(seed)
    lam = 0.75 * torch.polar(torch.rand(5, generator=generator), 6.28 * torch.rand(5, generator=generator))
    B, C = (torch.randn(shape, generator=generator, dtype=torch.complex64) for shape in ((5, 2), (3, 5)))
    system = DiagonalLTI(lam, B, C)
    length = 199
    outputs = []
    for channel in range(2):
        impulse = torch.zeros(length, 2)
        impulse[0, channel] = 1
        outputs.append(system.simulate(impulse))
    markov_parameters = torch.stack(outputs, dim=-1).numpy()
    measured = np.linalg.svd(hankel_matrix(markov_parameters), compute_uv=False)[:5]
    assert system.hankel_singular_values().numpy() == pytest.approx(measured, rel=1e-10)


@pytest.mark.parametrize("time_domain", TIME_DOMAINS)
@pytest.mark.parametrize("kind", ["siso", "mimo", "rank_deficient_B"])
def test_agree_with_slicot_and_pymor(kind: str, time_domain: str) -> None:
    system = random_system(kind, 2, time_domain)
    A, B, C = real_matrices(system)
    found = system.hankel_singular_values().numpy().repeat(2)
    n, inputs, outputs = len(A), B.shape[1], C.shape[0]
    slicot = slycot.ab09ad(
        "D" if time_domain == "discrete" else "C", "B", "N", n, inputs, outputs, A, B, C, nr=n, tol=0
    )
    assert found == pytest.approx(slicot[-1], rel=1e-8)
    pymor = LTIModel.from_matrices(A, B, C, sampling_time=1 if time_domain == "discrete" else 0)
    assert found == pytest.approx(pymor.hsv(), rel=1e-8)


def test_agree_with_python_control() -> None:
    """Continuous time only: `control.hsvd` is not implemented for discrete systems, and takes `eig(Wo Wc)`."""
    system = random_system("mimo", 0, "continuous")
    A, B, C = real_matrices(system)
    reference = control.hsvd(control.ss(A, B, C, np.zeros((C.shape[0], B.shape[1]))))
    assert system.hankel_singular_values().numpy().repeat(2) == pytest.approx(reference, rel=1e-5)


def test_one_state_by_hand() -> None:
    lam, b, c = 0.9j, 2 - 1j, 3j
    system = DiagonalLTI(torch.tensor([lam]), torch.tensor([[b]]), torch.tensor([[c]]))
    assert system.hankel_singular_values().item() == pytest.approx(abs(b * c) / (1 - abs(lam) ** 2), rel=1e-6)


def test_do_not_depend_on_the_basis() -> None:
    system = random_system("mimo", 5)
    P, Q = system.controllability_gramian(), system.observability_gramian()
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.complex128)).Q @ torch.diag(
        torch.logspace(-1, 1, 12) + 0j
    ).to(P)
    inverse = torch.linalg.inv(basis)
    moved = hankel_singular_values(basis @ P @ basis.mH, inverse.mH @ Q @ inverse)
    assert relative_error(moved, system.hankel_singular_values().numpy(), above=1e-4) < 1e-6


def test_do_not_depend_on_the_units_of_the_states() -> None:
    system = random_system("mimo", 5)
    units = 10 ** torch.linspace(-15, 15, 12, dtype=torch.float64)
    scaled = DiagonalLTI(system.lam, system.B * units[:, None], system.C / units)
    expected = system.hankel_singular_values()
    assert torch.allclose(scaled.hankel_singular_values(), expected, rtol=1e-13)
    assert torch.allclose(from_gramians(scaled), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["equal_poles", "dead_states", "rank_deficient_B"])
def test_rank_deficiency_gives_zeros_not_noise(kind: str) -> None:
    system = random_system(kind, 0)
    sigma = system.hankel_singular_values()
    # Four equal poles reached through two inputs hold two directions; four of nine states are dead.
    expected = {"equal_poles": 8 - 3, "dead_states": 9 - 4, "rank_deficient_B": 10}[kind]
    rank = np.linalg.matrix_rank(np.diag(exact_hankel_singular_values(system)), tol=1e-25)
    assert rank <= expected or kind == "rank_deficient_B"
    assert system.hankel_decomposition().usable_rank == rank
    assert (sigma[rank:] < 1e-15 * sigma[0]).all()


@pytest.mark.parametrize("kind", ["badly_scaled", "badly_scaled_siso"])
def test_bad_scaling_costs_no_digits(kind: str) -> None:
    for seed in range(4):
        system = random_system(kind, seed)
        exact = exact_hankel_singular_values(system)
        assert relative_error(system.hankel_singular_values(), exact, above=1e-12) < 1e-13


@pytest.mark.parametrize("kind", ["badly_scaled", "badly_scaled_siso", "real_poles"])
def test_small_is_not_rounding(kind: str) -> None:
    """Singular values down to N eps of the largest count as directions, and they are right to many digits."""
    for seed in range(3):
        system = random_system(kind, seed)
        exact = exact_hankel_singular_values(system)
        floor = system.order * np.finfo(float).eps * exact[0]
        assert (np.abs(exact / floor - 1) > 0.1).all()
        assert system.hankel_decomposition().usable_rank == (exact > floor).sum() >= 4


def test_no_input_or_no_output() -> None:
    silent = DiagonalLTI(torch.tensor([0.5, 0.9]), torch.zeros(2, 1), torch.ones(1, 2))
    assert silent.hankel_singular_values().tolist() == [0, 0]
    assert silent.hankel_decomposition().usable_rank == 0
    assert hankel_singular_values(torch.zeros(2, 2), torch.eye(2)).tolist() == [0, 0]


def test_decomposition_is_what_it_says() -> None:
    system = random_system("mimo", 1, batch=(3,))
    P, Q = system.controllability_gramian(), system.observability_gramian()
    for d in (system.hankel_decomposition(), hankel_decomposition(P, Q)):
        assert torch.allclose(d.L_P @ d.L_P.mH, P, rtol=1e-10, atol=1e-10)
        assert torch.allclose(d.L_Q @ d.L_Q.mH, Q, rtol=1e-10, atol=1e-10)
        product = d.U @ torch.diag_embed(d.sigma).to(d.V) @ d.V.mH
        assert torch.allclose(product, d.L_Q.mH @ d.L_P, rtol=1e-10, atol=1e-10)
        assert d.usable_rank.tolist() == [12, 12, 12]


@pytest.mark.parametrize(
    ("dtype", "rel"), [(torch.float32, 1e-5), (torch.complex64, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.05)]
)
def test_measured_gramians_of_any_dtype(dtype: torch.dtype, rel: float) -> None:
    states, adjoints = torch.randn(5, 400, dtype=torch.float64), torch.randn(5, 400, dtype=torch.float64)
    P, Q = states @ states.T, adjoints @ adjoints.T
    expected = np.sqrt(np.sort(np.linalg.eigvals((P @ Q).numpy()).real)[::-1])
    found = hankel_singular_values(P.to(dtype), Q.to(dtype))
    assert found.dtype == torch.float64
    assert found.numpy() == pytest.approx(expected, rel=rel)


def test_a_real_gramian_may_meet_a_complex_one() -> None:
    system = random_system("siso", 0)
    Q = system.observability_gramian()
    P = torch.eye(system.order)
    expected = torch.linalg.eigvalsh(Q).flip(-1).sqrt()
    assert torch.allclose(hankel_singular_values(P, Q)[:4], expected[:4], rtol=1e-8)


class TestArguments:
    def test_unequal_shapes(self) -> None:
        with pytest.raises(DimensionError, match=r"P has shape \(2, 2\) and Q \(3, 3\)"):
            hankel_singular_values(torch.eye(2), torch.eye(3))

    def test_unequal_devices(self) -> None:
        with pytest.raises(DimensionError, match="one device"):
            hankel_singular_values(torch.eye(2), torch.eye(2, device="meta"))

    def test_the_guilty_gramian_is_named(self) -> None:
        bad = torch.tensor([[1.0, float("inf")], [0.0, 1.0]])
        with pytest.raises(NotFiniteError, match="Q has 1 of 4"):
            hankel_singular_values(torch.eye(2), bad)
        with pytest.raises(ConfigurationError, match="P is indefinite"):
            hankel_singular_values(-torch.eye(2), torch.eye(2))

    def test_overflow_of_the_product(self) -> None:
        huge = 1e200 * torch.eye(2, dtype=torch.float64)
        with pytest.raises(NotFiniteError, match="product"):
            HankelDecomposition.from_factors(huge, huge)

    def test_unstable_system(self) -> None:
        with pytest.raises(UnstableSystemError, match=r"lam\[0\]"):
            DiagonalLTI(torch.tensor([1.5]), torch.ones(1, 1), torch.ones(1, 1)).hankel_singular_values()
