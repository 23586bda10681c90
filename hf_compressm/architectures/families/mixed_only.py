"""Layers of linear attention whose stock class has one size for keys, queries and values: only the mixed form fits."""

from __future__ import annotations

from ...errors import DimensionError, UnsupportedModelError
from ...models.compressed.mixing import mix
from ...systems import Truncation
from ..changes import LayerReduction, StateForm
from .mixable import MixableLayer


class MixedOnlyLayer(MixableLayer):
    """A layer whose keys and queries no stock class holds smaller; its projections stay as they are."""

    @classmethod
    def reductors(cls, stock: bool) -> frozenset[str]:
        """What a mixed layer can hold, and none with `stock`."""
        return frozenset() if stock else super().reductors(stock)

    @classmethod
    def default_reductor(cls, stock: bool) -> str:
        """Balanced truncation."""
        return "balanced"

    def require_form(self, stock: bool, reductor: str) -> None:
        """
        Raise where the stock class has to load the result.

        Args:
            stock (`bool`): Whether it has.
            reductor (`str`): The reductor's name.

        Raises:
            [`~errors.UnsupportedModelError`]: it has.
        """
        if stock:
            raise UnsupportedModelError(
                f"{self.name} (a {self.family} layer) cannot be cut in a stock model class: one "
                f"`{self.stock.config_size_name}` sizes its keys, queries and values, so that no stock class holds "
                "smaller keys. With stock=False, in a model of transformers' own class, it gets the mixed form."
            )

    def take_form(self, form: StateForm) -> None:
        """
        Give the layer another state size, in place, before a load.

        Raises:
            [`~errors.DimensionError`]: the form is for projections of another size, and with them other values.
        """
        if form.projected != self.projected_size:
            raise DimensionError(
                f"{self.name} projects keys to {self.projected_size} entries and what is loaded to {form.projected}; "
                f"build the model with its `{self.stock.config_size_name}`."
            )
        super().take_form(form)

    def resize(self, size: int) -> None:
        """Give the state another size before a load, in the mixed form where it is smaller than the projections."""
        if size < self.projected_size and not self.is_mixed:
            mix(self.module, size)
        super().resize(size)

    def _reduction(self, truncation: Truncation) -> LayerReduction:
        if self.is_mixed:
            return self._remixed(truncation)
        if truncation.state_size == self.projected_size:
            return LayerReduction(self, [], [], self.projected_size)
        return self._mixed(truncation)
