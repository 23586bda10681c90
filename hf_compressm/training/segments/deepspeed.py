"""The checkpoint of a DeepSpeed run, ZeRO stage 1, 2 or 3, by way of DeepSpeed's universal form."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ...errors import UnsupportedModelError
from .checkpoint import SegmentCheckpoint, complete_moments, names_in_groups

_UNIVERSAL_LATEST = "latest_universal"
_MODEL_STATES = "*_model_states.pt"
_CONVERTER = "deepspeed.checkpoint.ds_to_universal"


class DeepSpeedCheckpoint(SegmentCheckpoint):
    """
    A checkpoint of a DeepSpeed run.

    DeepSpeed's own converter turns the shards into its universal form, which has one file per parameter and moment;
    those files are cut, and DeepSpeed loads that form itself. Its files are pickles: resume from checkpoints of your
    own only.

    Args:
        folder (`Path`): The checkpoint.

    Raises:
        [`~errors.UnsupportedModelError`]: it holds no state of a DeepSpeed engine.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        tags = sorted(path for path in folder.glob("global_step*") if path.is_dir())
        if not tags or not list(tags[0].glob(_MODEL_STATES)):
            raise UnsupportedModelError(
                f"{folder} holds no state of a DeepSpeed engine (global_step*/{_MODEL_STATES}). A cut under DeepSpeed "
                "goes through the checkpoint: train with save_only_model=False."
            )
        self._tag = tags[0]
        name = self._tag.name.removesuffix("_universal") + "_universal"
        self._universal = self.fresh / name

    def prepare(self, trainer: Trainer) -> None:
        """
        Let DeepSpeed load the universal form where the checkpoint has it, and set right what it then gets wrong.

        Args:
            trainer (`transformers.Trainer`): Will resume from the checkpoint.
        """
        settings = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
        is_universal = (self.folder / _UNIVERSAL_LATEST).is_file()
        settings.config.setdefault("checkpoint", {})["load_universal"] = is_universal
        if is_universal and settings.is_zero3():
            groups = trainer.create_optimizer().param_groups
            trainer.optimizer = None
            trainer.add_callback(_AfterUniversal([{**group, "params": None} for group in groups]))

    def open_for_cut(self) -> None:
        """
        Convert the shards into a folder beside the checkpoint.

        Raises:
            [`~errors.UnsupportedModelError`]: the converter fails.
        """
        self._copy("global_step*", "latest*")
        command = [sys.executable, "-m", _CONVERTER, "--input_folder", str(self._tag)]
        command += ["--output_folder", str(self._universal), "--inject_missing_state"]
        command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise UnsupportedModelError(f"{_CONVERTER} could not convert {self._tag}: {run.stderr[-2000:]}")

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        groups = self._engine_state(self._tag)["param_shapes"]
        return {name: tuple(shape) for group in groups for name, shape in group.items()}

    def _weights(self) -> dict[str, Tensor]:
        engine = self._engine_state(self._universal)
        weights = {name: tensor for name, tensor in engine["module"].items() if name in engine["buffer_names"]}
        for name in self._shapes():
            weights[name] = self._read(name, "fp32")
        for name, original in engine["shared_params"].items():
            weights[name] = weights[original]
        return weights

    def _groups(self) -> list[list[str]]:
        return [list(group) for group in self._engine_state(self._tag)["param_shapes"]]

    def _moments(self) -> dict[str, dict[str, Any]]:
        common = self._common_step()
        moments: dict[str, dict[str, Any]] = {}
        for name in self._shapes():
            keys = [file.stem for file in self._folder_of(name).glob("*.pt") if file.stem != "fp32"]
            moments[name] = {key: self._read(name, key) for key in keys}
            if common is not None:
                moments[name]["step"] = common.clone()
        return moments

    def _write_cut(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        parameters = dict(model.named_parameters())
        example = next(iter(self._shapes()))
        forms = {file.stem: torch.load(file, weights_only=False) for file in self._folder_of(example).glob("*.pt")}
        for name, state in complete_moments(model, optimizer, same_step=True).items():
            folder = self._folder_of(name)
            folder.mkdir(exist_ok=True)
            for key, value in {"fp32": parameters[name], **state}.items():
                if key in forms:
                    torch.save(_in_form_of(forms[key], value), folder / f"{key}.pt")
        for name in set(self._shapes()) - set(parameters):
            shutil.rmtree(self._folder_of(name))
        shapes = [{name: parameters[name].shape for name in names} for names in names_in_groups(model, optimizer)]
        for file in self._universal.glob(_MODEL_STATES):
            engine = torch.load(file, map_location="cpu", weights_only=False)
            engine["param_shapes"] = shapes
            if not _is_partitioned(file):
                dtype = next(iter(engine["module"].values())).dtype
                engine["module"] = {name: _as_saved(value, dtype) for name, value in model.state_dict().items()}
            else:
                empty = torch.empty(0, dtype=next(iter(engine["module"].values())).dtype)
                engine["module"] = {name: engine["module"].get(name, empty) for name in model.state_dict()}
            torch.save(engine, file)
        (self.fresh / _UNIVERSAL_LATEST).write_text(self._universal.name, encoding="utf-8")

    def _engine_state(self, folder: Path) -> dict[str, Any]:
        file = min(folder.glob(_MODEL_STATES))
        # Written by this very run; it holds settings and enumerations beside the tensors.
        return torch.load(file, map_location="cpu", weights_only=False)

    def _folder_of(self, name: str) -> Path:
        return self._universal / "zero" / name

    def _read(self, name: str, key: str) -> Any:
        saved = torch.load(self._folder_of(name) / f"{key}.pt", map_location="cpu", weights_only=False)
        tensor = saved["param"] if isinstance(saved, dict) else saved
        # Stage 3 flattens.
        return tensor.reshape(self._shapes()[name]) if tensor.dim() else tensor

    def _common_step(self) -> Tensor | None:
        """The step count, where it is not kept with each parameter (stage 3)."""
        shared = torch.load(self._universal / "zero" / "optimizer_state.pt", map_location="cpu", weights_only=False)
        states = shared.get("optimizer_state_dict", {}).get("state", {})
        return torch.as_tensor(states[0]["step"], dtype=torch.float32) if 0 in states else None


class _AfterUniversal(TrainerCallback):
    """
    Undo what DeepSpeed's loader of the universal form does to the optimizer in stage 3.

    It gives all states one tensor for their step count, which an optimizer then counts up once per state, and all
    groups the settings of the first one, weight decay included (seen with DeepSpeed 0.19).
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs: Any) -> None:
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        for kept in optimizer.state.values():
            kept.update({key: value.clone() for key, value in kept.items() if key == "step"})
        for group, settings in zip(optimizer.param_groups, self._groups):
            # The schedule has set the rate already.
            group.update({key: value for key, value in settings.items() if key not in ("params", "lr")})


def _in_form_of(example: Any, value: Any) -> Any:
    """A parameter or moment as DeepSpeed wrote another one: in a dictionary, flattened, or as it is."""
    tensor = torch.as_tensor(value).detach().to("cpu", copy=True)
    if isinstance(example, dict):
        return {**example, "param": tensor}
    return tensor.flatten() if tensor.dim() else tensor


def _is_partitioned(file: Path) -> bool:
    """Whether a file of a model's states is that of one process of stage 3, whose parameters are elsewhere."""
    return file.name.startswith("zero_pp_rank_")


def _as_saved(value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().to("cpu", copy=True)
    return value.to(dtype) if value.is_floating_point() else value
