"""Runs whose wrapper shards the parameters: the cut is made between two trainings, through the checkpoint."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers import Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.trainer_utils import get_last_checkpoint

from ...architectures import find_layers
from ...compression import CheckRecord, Compressor, write_history
from ...compression.decide.progress import is_finished, warn_if_given_up
from ...errors import ConfigurationError
from ...files import checkpoint_folder
from ..batches import CapturedBatches, seed_of_process, training_batches, unchanged_random_state
from ..callback import CompreSSMCallback
from ..distributed import processes_of_training, run_facts
from ..resume import saved_run
from ..schedule import check_steps
from ..trainer_loss import trainer_loss
from .checkpoint import SegmentCheckpoint
from .deepspeed import DeepSpeedCheckpoint
from .fsdp import FSDPCheckpoint

_CHECKPOINTS: dict[DistributedType, type[SegmentCheckpoint]] = {
    DistributedType.FSDP: FSDPCheckpoint,
    DistributedType.DEEPSPEED: DeepSpeedCheckpoint,
}


def train_in_segments(
    make_trainer: Callable[[], Trainer], resume_from_checkpoint: str | os.PathLike | bool | None = None
) -> Trainer:
    """
    Train with a [`CompreSSMCallback`], under FSDP and DeepSpeed too.

    Under FSDP and ZeRO a process holds shards, and the wrapper keeps its own account of them. The run is therefore
    trained in segments: at each check it is saved and stopped, every process loads the weights into the model
    that a new Trainer brings, all calibrate and cut it together, one of them writes the smaller weights, moments and
    config into the checkpoint, and the new Trainer resumes from there with the same schedule, data position and random
    state. A run that dies at any point is resumed by the same call with `resume_from_checkpoint=True`. Without
    such a wrapper this is `trainer.train()`, which cuts in place.

    At a check each process holds the whole model on its device, the first one its moments too; the files have to be on
    storage that all processes share. What the Trainer evaluates after the step of a check is the model before the cut.

    Args:
        make_trainer (`Callable`): Takes nothing and returns a new `Trainer` with a new model at its original size and a
            `CompreSSMCallback`. It is called once per segment, in every process. Under ZeRO-3 what `from_pretrained`
            loads after the `TrainingArguments` were made is partitioned at once, and refused: load it before them.
        resume_from_checkpoint (`str`, `os.PathLike` or `bool`, *optional*): As in `Trainer.train`; with True, the
            latest checkpoint in the output folder, or a new run where there is none.

    Returns:
        `transformers.Trainer`: The Trainer of the last segment, trained.

    Raises:
        [`~errors.ConfigurationError`]: `make_trainer` is no function, or brings no Trainer or no callback,
            `resume_from_checkpoint` is of another type, or the run asks for what segments cannot do.
        [`~errors.UnsupportedModelError`]: the checkpoints are of a form that cannot be cut.

    Example:

    ```python
    from transformers import Trainer
    from hf_compressm import CompreSSMCallback, train_in_segments

    def make_trainer():
        return Trainer(model=build_model(), args=args, train_dataset=dataset, callbacks=[CompreSSMCallback()])

    trainer = train_in_segments(make_trainer)  # args with fsdp=True, started by torchrun or accelerate launch
    trainer.save_model("smaller")
    ```
    """
    _require_arguments(make_trainer, resume_from_checkpoint)
    return _train(make_trainer, resume_from_checkpoint)


def _train(make_trainer: Callable[[], Trainer], resume_from_checkpoint: str | os.PathLike | bool | None) -> Trainer:
    trainer = _new_trainer(make_trainer)
    callback = _callback_of(trainer)
    # The first process may have set incomplete checkpoints aside just now.
    trainer.accelerator.wait_for_everyone()
    checkpoint = _checkpoint_to_resume(trainer, resume_from_checkpoint)
    form = _CHECKPOINTS.get(trainer.accelerator.distributed_type)
    if form is None:
        # On one device accelerate leaves the model unwrapped, whatever the arguments say of FSDP.
        callback.train_whole()
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer
    while True:
        _require_segments(trainer, callback)
        if checkpoint is not None:
            _cut_if_due(trainer, callback, form(Path(checkpoint)))
            form(Path(checkpoint)).prepare(trainer)
        callback.pause_at_checks({layer.name: layer.state_size for layer in find_layers(trainer.model)})
        trainer.train(resume_from_checkpoint=checkpoint)
        if not callback.is_paused:
            return trainer
        checkpoint = str(checkpoint_folder(trainer.args.output_dir, trainer.state.global_step))
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.free_memory()
        del trainer
        gc.collect()
        trainer = _new_trainer(make_trainer)
        callback = _callback_of(trainer)


def _require_arguments(make_trainer: Any, resume_from_checkpoint: Any) -> None:
    if not callable(make_trainer):
        raise ConfigurationError(
            f"make_trainer is {_shown(make_trainer)}; give a function that takes nothing and returns a new Trainer."
        )
    if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, (bool, str, os.PathLike)):
        raise ConfigurationError(
            f"resume_from_checkpoint is {_shown(resume_from_checkpoint)}; give a checkpoint's folder, or True for the "
            "latest one in the output folder."
        )


def _shown(value: Any) -> str:
    # A Trainer, say, has no short text of its own.
    has_short_text = value is None or isinstance(value, (int, float, str, bytes))
    return repr(value)[:80] if has_short_text else f"a {type(value).__name__}"


def _new_trainer(make_trainer: Callable[[], Trainer]) -> Trainer:
    # from_pretrained partitions a model at once where the ZeRO-3 of an earlier Trainer, or its arguments, is known of.
    unset_hf_deepspeed_config()
    _forget_deepspeed_plugin()
    trainer = make_trainer()
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"make_trainer returns {_shown(trainer)}; let it return a new Trainer, with a CompreSSMCallback."
        )
    if getattr(trainer.args, "hf_deepspeed_config", None) is not None:
        set_hf_deepspeed_config(trainer.args.hf_deepspeed_config)
    return trainer


def _forget_deepspeed_plugin() -> None:
    # Accelerate takes a plugin once, for its first Accelerator. TrainingArguments made anew reset this, those that were
    # made outside of make_trainer do not. The process group stays.
    # Private API of accelerate.
    if AcceleratorState._shared_state.get("distributed_type") == DistributedType.DEEPSPEED:
        AcceleratorState._reset_state()


def _callback_of(trainer: Trainer) -> CompreSSMCallback:
    found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, CompreSSMCallback)]
    if len(found) != 1:
        raise ConfigurationError(
            f"the Trainer that make_trainer returns has {len(found)} CompreSSMCallbacks; give it one, in its callbacks."
        )
    return found[0]


def _checkpoint_to_resume(trainer: Trainer, given: str | os.PathLike | bool | None) -> str | None:
    if given is True:
        folder = trainer.args.output_dir
        return get_last_checkpoint(folder) if os.path.isdir(folder) else None
    return os.fspath(given) if given else None


def _require_segments(trainer: Trainer, callback: CompreSSMCallback) -> None:
    args = trainer.args
    problems = [
        (args.load_best_model_at_end, "load_best_model_at_end=True, and the best checkpoint may be one before a cut"),
        (args.save_only_model, "save_only_model=True, which leaves nothing to go on from"),
        (callback.config.judged_by_evaluation, "a rollback_metric of the evaluation (use 'calibration_loss')"),
        (bool(callback.averaged_weights), "averaged_weights, which no checkpoint holds"),
        (hasattr(trainer.model, "peft_config"), "an adapter (PEFT), whose checkpoints hold no base model"),
        (
            "optimizer" in _deepspeed_settings(trainer),
            "an optimizer in the DeepSpeed config (leave it out: the Trainer makes the one of its arguments)",
        ),
    ]
    found = [problem for present, problem in problems if present]
    if found:
        raise ConfigurationError(f"a run that is cut between segments cannot have {'; nor '.join(found)}.")


def _deepspeed_settings(trainer: Trainer) -> dict[str, Any]:
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return {} if plugin is None else plugin.hf_ds_config.config


def _cut_if_due(trainer: Trainer, callback: CompreSSMCallback, checkpoint: SegmentCheckpoint) -> None:
    """Bring the plain model to the checkpoint's sizes; where a check is due, make it and write its outcome there."""
    checkpoint.load_sizes(trainer.model)
    state = checkpoint.state
    records, step = saved_run(state, callback).records, state.global_step
    steps = check_steps(callback.config, state.max_steps)
    names = [layer.name for layer in find_layers(trainer.model)]
    made = any(record.step == step for record in records)
    if made or step not in steps or is_finished(records, callback.config, names):
        return
    records, changed, optimizer = _check(trainer, callback, checkpoint, records, step, steps)
    if trainer.args.process_index == 0:
        saved = state.stateful_callbacks[type(callback).__name__]
        entry = saved[0] if isinstance(saved, list) else saved
        entry["attributes"]["saved_records"] = [record.to_dict() for record in records]
        checkpoint.write(state, *((trainer.model, optimizer) if changed else ()))
        write_history(records, trainer.args.output_dir)
    trainer.accelerator.wait_for_everyone()


def _check(
    trainer: Trainer,
    callback: CompreSSMCallback,
    checkpoint: SegmentCheckpoint,
    records: list[CheckRecord],
    step: int,
    steps: list[int],
) -> tuple[list[CheckRecord], bool, Any]:
    """All records, whether the model was changed, and the optimizer that was changed with it, in the first process."""
    model, args = trainer.model, trainer.args
    if args.process_index == 0:
        checkpoint.open_for_cut()
    trainer.accelerator.wait_for_everyone()
    checkpoint.load_weights(model)
    home = next(model.parameters()).device
    model.to(args.device)
    optimizer = None
    if args.process_index == 0:
        optimizer = trainer.create_optimizer()
        checkpoint.load_optimizer(model, optimizer)
        # The next training makes its own, of the wrapped model.
        trainer.optimizer = None
    processes = processes_of_training()
    show = args.process_index == 0 and not args.disable_tqdm
    compressor = Compressor(
        model,
        # The training goes on, though one process alone has the optimizer.
        replace(callback.config, fit_readout=bool(callback.config.fit_readout)),
        loss_function=callback.loss_function or trainer_loss([trainer]),
        optimizer=optimizer,
        processes=processes,
        progress=None if show else False,
    )
    processes.agree("the training", run_facts(callback.config, compressor.sizes))
    compressor.restore(records)
    made = compressor.check_or_skip(
        lambda: _batches(trainer, callback, step, compressor.batches_per_check), step, steps
    )
    warn_if_given_up(compressor.records, steps, step, tries_again=False)
    model.to(home)
    return compressor.records, made[-1].outcome == "cut", optimizer


def _batches(trainer: Trainer, callback: CompreSSMCallback, step: int, count: int) -> list[Any]:
    args, config = trainer.args, callback.config
    with unchanged_random_state():
        loader = trainer.get_train_dataloader()
        source = training_batches(
            trainer.model,
            loader,
            args.train_batch_size,
            count,
            seed_of_process(args, config),
            given=callback.calibration_batches,
        )
        try:
            if isinstance(source, CapturedBatches):
                # Nothing was captured by this model yet: of a stream, its first batches do.
                return list(itertools.islice(loader, count))
            return source.draw(step)
        finally:
            source.close()
