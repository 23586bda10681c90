"""What a cut replaces, kept so that it can be put back later, in the same process or in one that resumed the run."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...architectures import LayerReduction, StateForm, StateSpaceLayer
from ...errors import InconsistentModelError
from .optimizer_parts import state_of

SNAPSHOT_NAME = "compressm_snapshot.safetensors"
AVERAGES_NAME = "compressm_snapshot_averages.safetensors"
LAYERS_NAME = "compressm_layers.safetensors"

_PARAMETER, _STATE = "parameter:", "state:"


@dataclass(frozen=True)
class Snapshot:
    """
    The parameters of some layers that a cut replaces and their optimizer state, from before the cut.

    It refers to the tensors that the cut took out of the model and the optimizer and copies none but scalars, so what
    it costs is that they stay in memory.

    Args:
        forms (`Mapping[str, StateForm]`): State size and projected size of each layer, by the layer's name.
        parameters (`Mapping[str, torch.Tensor]`): The parameters' values, by `layer.parameter`.
        states (`Mapping[str, Mapping[str, Any]]`): The optimizer's state of each parameter, by the same names.
    """

    forms: Mapping[str, StateForm]
    parameters: Mapping[str, Tensor]
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        layers: Sequence[StateSpaceLayer],
        optimizer: Any = None,
        only: Iterable[nn.Parameter] | None = None,
        whole: Collection[str] = (),
    ) -> Snapshot:
        """
        Take a snapshot of layers that are about to be cut.

        Args:
            layers (`Sequence[StateSpaceLayer]`): Layers whose parameters the cut replaces. One whose parameters stay in
                training must not be among them, as the snapshot would change with it.
            optimizer (`torch.optim.Optimizer`, *optional*): The optimizer, or a wrapper of it.
            only (`Iterable[torch.nn.Parameter]`, *optional*): The parameters that the cut replaces, where it leaves
                some of the layers' in training.
            whole (`Collection[str]`, *optional*): Layers, by name, of which everything is taken that a cut may replace,
                such as the projections of a mixed layer.
        """
        replaced = None if only is None else {id(parameter) for parameter in only}
        held = {
            f"{layer.name}.{name}": parameter
            for layer in layers
            for name, parameter in _parameters_of(layer, everything=replaced is not None or layer.name in whole)
            if replaced is None or id(parameter) in replaced
        }
        found = {name: None if optimizer is None else state_of(optimizer, p) for name, p in held.items()}
        states = {name: _own_scalars(state) for name, state in found.items() if state is not None}
        parameters = {name: parameter.detach() for name, parameter in held.items()}
        forms = {layer.name: layer.form for layer in layers}
        return cls(forms, parameters, states)

    def reductions(self, layers: Sequence[StateSpaceLayer]) -> list[LayerReduction]:
        """
        What puts the snapshot's tensors back into the layers that it holds. Nothing is written.

        Args:
            layers (`Sequence[StateSpaceLayer]`): Layers of the model; those that the snapshot does not hold are left
                out.

        Raises:
            [`~errors.DimensionError`]: a tensor of the snapshot has not the shape that its layer needs.
        """
        return [
            layer.restoration(
                self._of_layer(layer, self.parameters), self._of_layer(layer, self.states), self.forms[layer.name]
            )
            for layer in layers
            if layer.name in self.forms
        ]

    @staticmethod
    def _of_layer(layer: StateSpaceLayer, found: Mapping[str, Any]) -> dict[str, Any]:
        start = f"{layer.name}."
        return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}

    @classmethod
    def joined(cls, parts: Mapping[str, Snapshot]) -> Snapshot:
        """
        Snapshots of several modules in one, without the optimizer's state, for one file.

        Args:
            parts (`Mapping[str, Snapshot]`): The snapshots by the modules' names, which hold no `/`.
        """
        forms = {f"{part}/{name}": form for part, held in parts.items() for name, form in held.forms.items()}
        values = {f"{part}/{name}": value for part, held in parts.items() for name, value in held.parameters.items()}
        return cls(forms, values)

    def parts(self) -> dict[str, Snapshot]:
        """What [`~Snapshot.joined`] was made of."""

        def of(part: str, found: Mapping[str, Any]) -> dict[str, Any]:
            start = f"{part}/"
            return {name.removeprefix(start): value for name, value in found.items() if name.startswith(start)}

        names = dict.fromkeys(name.split("/", 1)[0] for name in self.forms)
        return {part: Snapshot(of(part, self.forms), of(part, self.parameters)) for part in names}

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        tensors = [*self.parameters.values(), *(v for s in self.states.values() for v in s.values())]
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))

    def save(self, folder: str | os.PathLike, file_name: str = SNAPSHOT_NAME) -> Path:
        """
        Write the snapshot to a folder, replacing the file as a whole.

        Args:
            folder (`str` or `os.PathLike`): An existing folder.
            file_name (`str`, *optional*, defaults to `"compressm_snapshot.safetensors"`): The file's name.
        """
        tensors = {_PARAMETER + name: value.contiguous() for name, value in self.parameters.items()}
        plain: dict[str, dict[str, Any]] = {}
        for name, state in self.states.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{_STATE}{key}:{name}"] = value.contiguous()
                else:
                    plain.setdefault(name, {})[key] = value
        path = Path(folder) / file_name
        temporary = path.with_suffix(".partial")
        metadata = {"format": "pt", "forms": json.dumps(dict(self.forms)), "plain": json.dumps(plain)}
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, folder: str | os.PathLike, file_name: str = SNAPSHOT_NAME) -> Snapshot:
        """
        Read the snapshot in a folder, onto the CPU.

        Args:
            folder (`str` or `os.PathLike`): Where [`~Snapshot.save`] wrote it.
            file_name (`str`, *optional*, defaults to `"compressm_snapshot.safetensors"`): The file's name.

        Raises:
            `FileNotFoundError`: there is none.
            [`~errors.InconsistentModelError`]: the file is not whole, or is none that [`~Snapshot.save`] wrote.
        """
        path = Path(folder) / file_name
        try:
            return cls._read(path)
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError) as error:
            raise InconsistentModelError(
                f"{path} is not what hf_compressm saves before a cut: {error!r:.200}. Restore the file, or remove it "
                "with the folder that it is in."
            ) from error

    @classmethod
    def _read(cls, path: Path) -> Snapshot:
        parameters: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            states: dict[str, dict[str, Any]] = json.loads(metadata["plain"])
            for name in list(file.keys()):
                if name.startswith(_PARAMETER):
                    parameters[name.removeprefix(_PARAMETER)] = file.get_tensor(name)
                else:
                    key, parameter = name.removeprefix(_STATE).split(":", 1)
                    states.setdefault(parameter, {})[key] = file.get_tensor(name)
        forms = json.loads(metadata["forms"]) if "forms" in metadata else json.loads(metadata["sizes"])
        # Before layers could mix states, a size was all there was.
        read = {name: StateForm(*((form, form) if isinstance(form, int) else form)) for name, form in forms.items()}
        return cls(read, parameters, states)


def _parameters_of(layer: StateSpaceLayer, everything: bool) -> Iterable[tuple[str, nn.Parameter]]:
    if everything:
        return layer.replaceable_parameters().items()
    return {**layer.state_parameters(), **layer.rescaled_parameters()}.items()


def _own_scalars(state: Mapping[str, Any]) -> dict[str, Any]:
    # A step counter goes on counting in the state of the cut parameter; only what was counted so far belongs here.
    return {
        key: value.clone() if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in state.items()
    }
