"""What the steps between two samples of a delta rule do to a state, and to the gradient of one, by matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._validation import compute_dtype, elements_at_once

CHUNK_ELEMENTS = 2**23

# Up to this many steps, products with a decay an entry are made pair by pair.
_PAIRS = 4


@dataclass(frozen=True)
class Rule:
    """
    The arguments of a delta rule in one dtype.

    Args:
        query, key, erase (`torch.Tensor` of shape `(batch, length, key_heads, N)`): As in [`~ops.delta_rule`].
        log_decay (`torch.Tensor` of shape `(batch, length, heads, 1 or N)`): Logarithms of the decays.
        beta (`torch.Tensor` of shape `(batch, length, heads)`): As in [`~ops.delta_rule`].
        value, grad_output (`torch.Tensor` of shape `(batch, length, heads, head_dim)`, *optional*): What is written, or
            the gradient of what is read.
    """

    query: Tensor
    key: Tensor
    erase: Tensor
    log_decay: Tensor
    beta: Tensor
    value: Tensor | None = None
    grad_output: Tensor | None = None

    @classmethod
    def of(cls, query, key, log_decay, beta, erase, value=None, grad_output=None) -> Rule:
        given = [x for x in (query, key, log_decay, beta, value, grad_output) if x is not None]
        dtype = compute_dtype(*given)
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        erase = key if erase is None else erase
        tensors = (query, key, erase, log_decay, beta, value, grad_output)
        return cls(*(None if x is None else x.detach().to(dtype) for x in tensors))

    @property
    def shared(self) -> int:
        """How many value heads share a key head."""
        return self.beta.shape[2] // self.key.shape[2]

    def sequences(self, part: slice) -> Rule:
        """The same of some sequences."""
        return Rule(*(None if x is None else x[part] for x in vars(self).values()))

    def by_value_head(self, vectors: Tensor, axis: int) -> Tensor:
        """Vectors of key heads, repeated for the value heads."""
        return vectors.repeat_interleave(self.shared, dim=axis) if self.shared > 1 else vectors


def states_at(stops: Tensor, rule: Rule) -> Iterator[tuple[Tensor, slice]]:
    """Chunk by chunk: the states at the stops, (batch, chunk, heads, N, head_dim), and the chunk's slice."""
    batch, heads, head_dim = rule.value.shape[0], *rule.value.shape[2:]
    state = rule.value.new_zeros(batch, heads, rule.key.shape[-1], head_dim)
    for chunk, begins, ends, width in _chunks(stops, rule, head_dim):
        stretch = _Stretch.between(begins, ends, width, rule)
        written, read = stretch.solve(stretch.value * stretch.beta[..., None])
        keys = (stretch.key * stretch.to_end).mT
        states = []
        for k in range(ends.shape[1]):
            state = stretch.whole[:, k] * state + keys[:, k] @ (written[:, k] - read[:, k] @ state)
            states.append(state)
        yield torch.stack(states, 1), chunk


def adjoints_at(stops: Tensor, rule: Rule) -> Iterator[tuple[Tensor, slice]]:
    """Chunk by chunk, from the end: what all steps after a stop add to its state's gradient, and the chunk's slice."""
    batch, length, heads, head_dim = rule.grad_output.shape
    adjoint = rule.grad_output.new_zeros(batch, heads, rule.key.shape[-1], head_dim)
    for chunk, after, before, width in _chunks(stops, rule, head_dim):
        stretch = _Stretch.between(length - 2 - before, length - 2 - after, width, rule)
        (read,) = stretch.solve()
        keys = stretch.key * stretch.to_end
        query = stretch.query * stretch.decay
        added = (query - stretch.products(stretch.query) @ read).mT @ stretch.grad_output
        read, adjoints = read.mT, []
        for k in range(before.shape[1]):
            adjoint = stretch.whole[:, k] * adjoint - read[:, k] @ (keys[:, k] @ adjoint) + added[:, k]
            adjoints.append(adjoint)
        yield torch.stack(adjoints, 1), chunk


def _chunks(stops: Tensor, rule: Rule, head_dim: int) -> Iterator[tuple[slice, Tensor, Tensor, int]]:
    """Slices of stops with the stop before each, (batch, chunk), and the stop itself; and the longest way between."""
    before = torch.cat([stops.new_full((len(stops), 1), -1), stops[:, :-1]], dim=1)
    width = max(1, int((stops - before).max())) if stops.numel() else 1
    heads, n_states = rule.beta.shape[2], rule.key.shape[3]
    elements = len(stops) * heads * (n_states * head_dim + width * (4 * n_states + 2 * head_dim + 2 * width))
    size = max(1, elements_at_once(CHUNK_ELEMENTS, rule.key.device) // elements)
    for start in range(0, stops.shape[1], size):
        chunk = slice(start, start + size)
        yield chunk, before[:, chunk], stops[:, chunk], width


@dataclass(frozen=True)
class _Stretch:
    """
    What happens from one stop to the next, (batch, stops, heads, width, ...), each stretch filled up at its front.

    A step that fills up decays nothing, writes nothing and reads nothing.
    """

    query: Tensor
    key: Tensor
    erase: Tensor
    logs: Tensor
    """Sums of the logarithms of decays, up to each step."""
    beta: Tensor
    value: Tensor | None
    grad_output: Tensor | None

    @classmethod
    def between(cls, begins: Tensor, ends: Tensor, width: int, rule: Rule) -> _Stretch:
        steps = ends[..., None] - torch.arange(width - 1, -1, -1, device=ends.device)
        inside = steps > begins[..., None]
        steps, sequence = steps.clamp_min(0), torch.arange(len(ends), device=ends.device)[:, None, None]

        def gather(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[sequence, steps].transpose(2, 3)

        vectors = [rule.by_value_head(gather(x), axis=2) for x in (rule.query, rule.key, rule.erase)]
        inside = inside[:, :, None]
        # Far down the sequence a running sum of logarithms has few digits left; a stretch has all of them.
        logs = (gather(rule.log_decay) * inside[..., None]).cumsum(3)
        grad_output = gather(rule.grad_output)
        return cls(
            *vectors, logs, gather(rule.beta[..., None]).squeeze(-1) * inside, gather(rule.value),
            None if grad_output is None else grad_output * inside[..., None],
        )  # fmt: skip

    @property
    def decay(self) -> Tensor:
        """From the beginning to each step, (..., width, 1 or N)."""
        return self.logs.exp()

    @property
    def to_end(self) -> Tensor:
        """From each step to the end, (..., width, 1 or N)."""
        return (self.logs[..., -1:, :] - self.logs).exp()

    @property
    def whole(self) -> Tensor:
        """From the beginning to the end, (..., 1 or N, 1)."""
        return self.logs[..., -1, :, None].exp()

    def products(self, vectors: Tensor) -> Tensor:
        """The products of vectors with the keys of the same and of earlier steps, as these have decayed by then."""
        if self.logs.shape[-1] > 1:
            return _decayed_products(vectors, self.key, self.logs)
        later = torch.ones(*[self.key.shape[-2]] * 2, dtype=torch.bool, device=self.key.device).triu(1)
        decays = (self.logs - self.logs.mT).masked_fill(later, -torch.inf).exp()
        return decays * (vectors @ self.key.mT)

    def solve(self, *written: Tensor) -> tuple[Tensor, ...]:
        """
        Of what the steps would write if none saw the others, what they do write; and last, what they erase of a state.

        Given and returned: (..., width, head_dim); the last, (..., width, N), is to be multiplied by the state at the
        beginning.
        """
        beta = self.beta[..., None]
        system = beta * self.products(self.erase)
        sides = [*written, beta * self.erase * self.decay]
        solved = torch.linalg.solve_triangular(system, torch.cat(sides, -1), upper=False, unitriangular=True)
        return solved.split([side.shape[-1] for side in sides], dim=-1)


def _decayed_products(vectors: Tensor, keys: Tensor, logs: Tensor) -> Tensor:
    r"""
    \\( \sum_c x_{ic} k_{jc} e^{l_{ic} - l_{jc}} \\) for \\( j \le i \\), zero elsewhere, with l descending in time.

    Steps of the second half meet those of the first at the border between them: both ways from there only decay, so
    nothing overflows, however strong the decays are. Each half is then halved itself.
    """
    width = vectors.shape[-2]
    if width <= _PAIRS:
        later = torch.ones(width, width, dtype=torch.bool, device=keys.device).triu(1)
        decays = (logs[..., :, None, :] - logs[..., None, :, :]).masked_fill(later[..., None], -torch.inf).exp()
        return (vectors[..., :, None, :] * keys[..., None, :, :] * decays).sum(-1)
    half = width // 2
    first, second = slice(None, half), slice(half, None)
    border = logs[..., half - 1 : half, :]
    late = vectors[..., second, :] * (logs[..., second, :] - border).exp()
    early = keys[..., first, :] * (border - logs[..., first, :]).exp()
    products = vectors.new_zeros(*vectors.shape[:-1], width)
    products[..., second, first] = late @ early.mT
    for part in (first, second):
        products[..., part, part] = _decayed_products(*(tensor[..., part, :] for tensor in (vectors, keys, logs)))
    return products
