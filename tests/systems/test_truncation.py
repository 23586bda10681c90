"""`Truncation` accepts projections and nothing else."""

from __future__ import annotations

import pytest
import torch

from hf_compressm.errors import DimensionError, NotFiniteError, TruncationError
from hf_compressm.systems import Truncation


def oblique(
    N: int, r: int, batch: tuple = (), dtype: torch.dtype = torch.complex128
) -> tuple[torch.Tensor, torch.Tensor]:
    T, W = torch.randn(*batch, N, r, dtype=dtype), torch.randn(*batch, N, r, dtype=dtype)
    return T, torch.linalg.solve(W.mH @ T, W.mH).mH


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_an_oblique_projection(dtype: torch.dtype) -> None:
    truncation = Truncation(*oblique(6, 2, batch=(3,), dtype=dtype))
    assert (truncation.state_size, truncation.full_size) == (2, 6)
    assert truncation.indices is None
    assert not truncation.is_selection


def test_a_selection() -> None:
    truncation = Truncation.from_indices(torch.tensor([0, 3]), full_size=5)
    assert truncation.is_selection
    assert truncation.T.dtype == torch.float64
    h = torch.arange(5.0, dtype=torch.float64) + 1
    assert (truncation.W.mT @ h).tolist() == [1.0, 4.0]
    assert (truncation.T @ torch.tensor([7.0, 8.0], dtype=torch.float64)).tolist() == [7, 0, 0, 8, 0]


def test_a_fold_is_no_selection() -> None:
    T = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]])
    truncation = Truncation.from_indices([0, 2], full_size=3, T=T)
    assert truncation.T.dtype == truncation.W.dtype == torch.float32
    assert not truncation.is_selection
    assert truncation.indices.tolist() == [0, 2]


def test_a_batch_of_selections() -> None:
    truncation = Truncation.from_indices(torch.tensor([[0, 1], [1, 3]]), full_size=4, dtype=torch.complex128)
    assert truncation.T.shape == (2, 4, 2)
    assert truncation.T.dtype == torch.complex128
    assert truncation.T[1].real.tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]


def test_all_states() -> None:
    truncation = Truncation.from_indices(range(3), full_size=3)
    assert torch.equal(truncation.T, torch.eye(3, dtype=torch.float64))


def test_changing_T_does_not_change_W() -> None:
    truncation = Truncation.from_indices([0], full_size=2)
    truncation.T[1, 0] = 5
    assert truncation.W[1, 0] == 0


class TestArguments:
    def test_biorthogonality(self) -> None:
        T, W = oblique(6, 2)
        with pytest.raises(TruncationError, match=r"W\^H T differs from the identity by 1; allowed is 1e-08"):
            Truncation(2 * T, W)
        T[0] += 1e-5
        with pytest.raises(TruncationError, match="differs from the identity"):
            Truncation(T, W)

    def test_a_lost_conjugate(self) -> None:
        T, W = oblique(6, 2)
        with pytest.raises(TruncationError):
            Truncation(T, W.conj())

    def test_rounding_is_that_of_the_dtype(self) -> None:
        T, W = oblique(6, 2, dtype=torch.float64)
        Truncation((T * (1 + 1e-5)).float(), W.float())
        with pytest.raises(TruncationError):
            Truncation(T * (1 + 1e-5), W)

    @pytest.mark.parametrize("name", ["T", "W"])
    def test_not_finite(self, name: str) -> None:
        T, W = oblique(4, 2)
        {"T": T, "W": W}[name][1, 1] = float("nan")
        with pytest.raises(NotFiniteError, match=f"{name} has 1 of 8"):
            Truncation(T, W)

    @pytest.mark.parametrize(("T", "W"), [((4, 2), (4, 3)), ((2, 4), (2, 4)), ((4,), (4,)), ((4, 0), (4, 0))])
    def test_shapes(self, T: tuple, W: tuple) -> None:
        with pytest.raises(DimensionError, match="must be"):
            Truncation(torch.zeros(T), torch.zeros(W))

    def test_dtypes_and_devices(self) -> None:
        eye = torch.eye(3)
        with pytest.raises(DimensionError, match="same real or complex dtype"):
            Truncation(eye, eye.double())
        with pytest.raises(DimensionError, match="same real or complex dtype"):
            Truncation(eye.long(), eye.long())
        with pytest.raises(DimensionError, match="one device"):
            Truncation(eye, eye.to("meta"))

    @pytest.mark.parametrize("indices", [[0, 4], [-1, 2], [1, 1], [2, 1]])
    def test_indices_that_are_no_set_of_states(self, indices: list) -> None:
        with pytest.raises(DimensionError, match="from 0 to 3, distinct, and in ascending order"):
            Truncation.from_indices(indices, full_size=4)

    @pytest.mark.parametrize("indices", [torch.tensor([0.0]), torch.tensor(0), torch.tensor([], dtype=torch.int64)])
    def test_indices_of_the_wrong_kind(self, indices: torch.Tensor) -> None:
        with pytest.raises(DimensionError, match="int64 of shape"):
            Truncation.from_indices(indices, full_size=4)

    def test_indices_of_another_W(self) -> None:
        eye = torch.eye(3)
        with pytest.raises(TruncationError, match="not the columns of the identity"):
            Truncation(eye[:, :2], eye[:, :2], indices=torch.tensor([0, 2]))
        with pytest.raises(DimensionError, match=r"indices have shape \(1,\)"):
            Truncation(eye[:, :2], eye[:, :2], indices=torch.tensor([0]))

    def test_a_T_that_changes_kept_states(self) -> None:
        with pytest.raises(TruncationError, match=r"differs from the identity by 0\.5"):
            Truncation.from_indices([0], full_size=2, T=torch.tensor([[0.5], [1.0]]))
        with pytest.raises(DimensionError, match="T has shape"):
            Truncation.from_indices([0], full_size=2, T=torch.ones(3, 1))
