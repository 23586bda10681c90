"""What all selective layers share: where their sizes stand, how they are recognised, watched and checked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import TruncationError, UnsupportedModelError
from ...models.compressed.stock_families import StockFamily
from ...systems import Truncation
from ..changes import AttributeChange, LayerReduction
from ..config_size import ConfigSize
from ..contract import ScanObserver, StateSpaceLayer
from ..scans.switch import calls_registered_scan, watching
from ..state_layout import SizeAttribute, runs

# What mamba-ssm calls the state size of a mixer.
_SIZE_NAME_OF_MAMBA_SSM = "d_state"
# Switches of mamba-ssm between the fused path, which never calls the scan by itself, and the path that does.
_FUSED_PATH_SWITCHES = ("use_fast_path", "use_mem_eff_path")


class SelectiveLayer(StateSpaceLayer):
    """
    A mixer whose B, C and time step depend on the input.

    Args:
        name (`str`): The module's qualified name in the model.
        module (`torch.nn.Module`): The mixer.
        configs (`Sequence`, *optional*): The configs of the models around it, the innermost first.
    """

    stock: ClassVar[StockFamily]
    """What transformers calls the family's mixer, its module and its config's state size."""

    other_mixers: ClassVar[frozenset[str] | None] = frozenset()
    """Names of other libraries' mixers of the same form; None where any class that has the parts is one."""

    required_parts: ClassVar[tuple[str, ...]] = ()
    """Attributes that a mixer of the family has."""

    foreign_parts: ClassVar[tuple[str, ...]] = ()
    """Attributes that distinguish a mixer of another family from one of this."""

    cut_projections: ClassVar[dict[str, type[nn.Module]]] = {}
    """Modules inside the mixer whose rows are cut, and the class that they must have."""

    adaptable_projections: ClassVar[frozenset[str]] = frozenset()
    """Those of them that a mixed layer leaves as they are and calls as modules, so that an adapter may hold them."""

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is a mixer of the family and calls a scan that can be watched."""
        if cls.other_mixers is not None:
            known = {cls.stock.mixer, *cls.other_mixers}
            if not any(base.__name__ in known for base in type(module).__mro__):
                return False
        if not all(hasattr(module, name) for name in cls.required_parts):
            return False
        if any(hasattr(module, name) for name in cls.foreign_parts):
            return False
        return cls._size_name(module) is not None and cls._can_be_watched(module)

    @classmethod
    def _can_be_watched(cls, module: nn.Module) -> bool:
        """Whether [`~SelectiveLayer.observed`] sees the recurrence of a module that has all parts."""
        return calls_registered_scan(module)

    @classmethod
    def _size_name(cls, module: nn.Module) -> str | None:
        return named_size(module, (cls.stock.size_name, _SIZE_NAME_OF_MAMBA_SSM))

    @classmethod
    def sizes_may_differ(cls, stock: bool, reductor: str) -> bool:
        """Not in a stock model class."""
        return not stock

    @property
    def state_size(self) -> int:
        """The present number of states per channel, N."""
        return getattr(self.module, self._size_name(self.module))

    @property
    def size_attribute(self) -> SizeAttribute:
        """The attribute of the mixer that says how many entries B and C have where they are projected."""
        return SizeAttribute("", self._size_name(self.module), runs())

    def require_reducible(self) -> None:
        """
        Raise when the layer cannot be cut.

        Raises:
            [`~errors.UnsupportedModelError`]: a parameter is sharded or quantised, a module whose rows would be cut is
                of another class (an adapter wraps it), or a parameter's shape disagrees with the layer's state size.
        """
        # An adapter shows the weight that it wraps, by which the layer's sizes are known.
        adapted = {name for name in self.adaptable_projections if hasattr(getattr(self.module, name), "weight")}
        self._require_own_projections(*(name for name in self.cut_projections if name not in adapted))
        super().require_reducible()

    def require_form(self, stock: bool, reductor: str) -> None:
        """
        Raise when an adapter holds a module whose rows a cut with these settings would change.

        Args:
            stock (`bool`): Whether the stock model class has to load the result.
            reductor (`str`): The reductor's name.

        Raises:
            [`~errors.UnsupportedModelError`]: it does.
        """
        self._require_own_projections(*self.cut_projections)

    def _require_own_projections(self, *names: str) -> None:
        for name in names:
            found, expected_class = getattr(self.module, name), self.cut_projections[name]
            if not isinstance(found, expected_class):
                raise UnsupportedModelError(
                    f"{self.name}.{name} is a {type(found).__name__} and not a torch.nn.{expected_class.__name__}; "
                    f"its rows would be cut. Leave {name} out of the adapter's target modules, or merge the adapter "
                    "first."
                )

    @classmethod
    def config_changes(cls, layers: Sequence[StateSpaceLayer], sizes: Sequence[int]) -> list[AttributeChange]:
        """The state size in every config around the layers, the largest of the sizes of the layers inside."""
        found: dict[int, tuple[Any, int]] = {}
        for layer, size in zip(layers, sizes):
            for config in layer.configs:
                found[id(config)] = (config, max(int(size), found.get(id(config), (config, 0))[1]))
        changes = [cls._config_change(config, size) for config, size in found.values()]
        return [change for change in changes if change is not None]

    @classmethod
    def _config_change(cls, config: Any, size: int) -> AttributeChange | None:
        if isinstance(getattr(config, "ssm_cfg", None), dict):  # mamba-ssm
            return AttributeChange(config, "ssm_cfg", {**config.ssm_cfg, "d_state": size})
        field = cls.config_size()
        known = field.read(config) is not None
        return AttributeChange(config, field.name, field.value(config, size)) if known else None

    @classmethod
    def config_size(cls) -> ConfigSize:
        """How the family's config holds the state size."""
        return ConfigSize(cls.stock.config_size_name)

    @contextmanager
    def observed(self, observer: ScanObserver) -> AbstractContextManager[None]:
        """While the context is open, each forward pass of the layer shows its scan to the observer."""
        with ExitStack() as stack:
            stack.enter_context(watching(self.module, observer))
            for name in _FUSED_PATH_SWITCHES:
                if getattr(self.module, name, False):
                    setattr(self.module, name, False)
                    stack.callback(setattr, self.module, name, True)
            yield

    def reduce(self, truncation: Truncation) -> LayerReduction:
        """
        Build the layer's tensors and sizes for a smaller state. Nothing is written.

        Raises:
            [`~errors.DimensionError`]: the truncation is for another state size.
            [`~errors.TruncationError`]: the layer cannot hold it, or a new weight is not finite in its dtype.
        """
        self.require_own_size(truncation)
        with torch.no_grad():
            reduction = self._reduction(truncation.to(self._device))
        for change in (*reduction.parameters, *reduction.added):
            if not torch.isfinite(change.new).all():
                raise TruncationError(
                    f"a weight of {self.name} is not finite in {change.new.dtype} after the fold (largest entry of the "
                    f"reconstruction: {truncation.T.abs().max().item():.3g}). Use the selection reductor for this "
                    "model."
                )
        return reduction

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @abstractmethod
    def _reduction(self, truncation: Truncation) -> LayerReduction:
        """The reduction for a truncation of the layer's own state size."""

    def _require_kept_states(self, truncation: Truncation) -> Tensor:
        """
        The indices of the kept states, on the layer's device.

        Raises:
            [`~errors.TruncationError`]: the truncation mixes states.
        """
        if truncation.indices is None:
            raise TruncationError(
                f"the truncation mixes states, which {self.name} (a {self.family} layer with one diagonal A per "
                "channel) cannot hold; use an interpolative or a selecting reductor."
            )
        return truncation.indices.to(self._device)

    def _require_selection(self, truncation: Truncation) -> Tensor:
        """
        The indices of the kept states, on the layer's device.

        Raises:
            [`~errors.TruncationError`]: the truncation does more than select.
        """
        if not truncation.is_selection:
            raise TruncationError(
                f"the truncation combines states, which the stock weights of {self.name} (a {self.family} layer, whose "
                "B and C pass a convolution or a norm) cannot hold; use the selection reductor."
            )
        return truncation.indices.to(self._device)


def named_size(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of several names under which a module holds a whole number, or None."""
    return next((name for name in names if isinstance(getattr(module, name, None), int)), None)
