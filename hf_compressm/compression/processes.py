"""What a check needs of the other processes of a training: sums, one decision, agreement, and word of a failure."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class Processes(Protocol):
    """The processes that train one model together."""

    def sum(self, tensor: Tensor) -> Tensor:
        """
        The sum of a float64 tensor over all processes.

        Raises:
            [`~errors.OtherProcessError`]: another process has failed before it came here.
        """
        ...

    def first(self, value: Value) -> Value:
        """
        What the first process has, in all of them.

        A decomposition rounds as the processor and the number of threads have it, so that processes which decompose the
        same matrix can come to different ranks and bases.

        Args:
            value (`object`): Tensors, dataclasses, and nested containers of them; those of other processes come back on
                the CPU.

        Raises:
            [`~errors.OtherProcessError`]: another process has failed before it came here.
        """
        ...

    def agree(self, subject: str, facts: dict[str, Any]) -> None:
        """
        Make sure that all processes say the same.

        Args:
            subject (`str`): What the facts are about, for the message.
            facts (`dict`): Facts by name, with values that `repr` distinguishes.

        Raises:
            [`~errors.OtherProcessError`]: another process has failed before it came here.
            [`~errors.DisagreementError`]: some facts differ; raised in every process.
        """
        ...

    def failed(self, error: BaseException) -> None:
        """Let the others know, which wait in [`sum`], [`first`] or [`agree`], that this process will not come."""
        ...


class SingleProcess:
    """A training in one process."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def first(self, value: Value) -> Value:
        """The value itself."""
        return value

    def agree(self, subject: str, facts: dict[str, Any]) -> None:
        """Nothing: one process agrees with itself."""

    def failed(self, error: BaseException) -> None:
        """Nothing: nobody waits."""
