"""
Trains tiny models in the processes that a launcher has started, and writes what each process ends with.

    python -m torch.distributed.run --nproc_per_node 2 tests/distributed/worker.py FOLDER CASE ...
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))
from hf_compressm import CompreSSMCallback, CompreSSMConfig, CompreSSMError  # noqa: E402
from hf_compressm.architectures import find_layers  # noqa: E402
from hf_compressm.training import data_parallel  # noqa: E402
from tests.cases import VOCABULARY, tiny_lru, tiny_mamba  # noqa: E402
from tests.delta_rule_models import tiny_gated_delta_net  # noqa: E402
from tests.selective_models import tiny_mamba2  # noqa: E402

DEVICE = os.environ.get("DEVICE", "cpu")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
JOINT_BATCH = 8
STEPS = 9


def rows(count: int, seed: int) -> torch.Tensor:
    """Random tokens, the same in every process."""
    return torch.randint(0, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(seed))


def dataset() -> Dataset:
    """The training set."""
    tokens = rows(JOINT_BATCH * STEPS, seed=1).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens}).with_format("torch")


def calibration_batch() -> dict[str, torch.Tensor]:
    """This process's share of the joint calibration batch."""
    mine = rows(JOINT_BATCH, seed=2).chunk(WORLD)[RANK]
    return {"input_ids": mine, "labels": mine}


class Watch(TrainerCallback):
    """Counts what the reducer does, by a communication hook, and sees whether what was replaced is freed."""

    def __init__(self) -> None:
        self.buckets: list[int] = []
        self.old: list[weakref.ref] = []
        self.wrapper: Any = None

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step != 1 or WORLD == 1:
            return
        self.wrapper = data_parallel.wrappers_of(model)[0]
        self.old = [weakref.ref(self.wrapper.reducer), *(weakref.ref(p) for p in model.parameters())]
        average = torch.distributed.algorithms.ddp_comm_hooks.default_hooks.allreduce_hook

        def count(group, bucket):
            self.buckets.append(bucket.buffer().numel())
            return average(group, bucket)

        self.wrapper.register_comm_hook(None, count)


class OwnLoss(Trainer):
    """A subclass that makes another loss than the model's, of nothing but its tokens."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        targets = inputs.pop("labels")[:, 1:]
        return 0.5 * torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()) + 1


def train(
    build: Callable[[], torch.nn.Module],
    folder: Path,
    resume: str | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    first_callbacks: tuple[TrainerCallback, ...] = (),
    steps: int = STEPS,
    config: dict[str, Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
    **settings: Any,
) -> tuple[Trainer, CompreSSMCallback]:
    """One training in all processes, cut after step 6."""
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=JOINT_BATCH // WORLD // accumulation,
        learning_rate=1e-2, lr_scheduler_type="linear", report_to="none", use_cpu=DEVICE == "cpu", disable_tqdm=True,
        logging_steps=1, train_sampling_strategy="sequential", **{"save_strategy": "no", **settings},
    )  # fmt: skip
    config = {"strategy": "fixed", "keep_ratio": 0.5, "window": (3, 6), "interval": 3, **(config or {})}
    # Readouts are fitted to what the first process has seen, which a run in one process sees with the rest.
    callback = CompreSSMCallback(
        CompreSSMConfig(**{"fit_readout": False, **config}), calibration_batches=[*filter(None, [calibration_batch()])]
    )
    model = build()
    callbacks = [*first_callbacks, callback, *callbacks]
    evaluated = dataset().select(range(JOINT_BATCH)) if "eval_strategy" in settings else None
    trainer = trainer_class(model, args, train_dataset=dataset(), eval_dataset=evaluated, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def ended(trainer: Trainer, callback: CompreSSMCallback) -> dict[str, Any]:
    """What a process ends with."""
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {
        "parameters": {name: p.detach().to("cpu", copy=True) for name, p in trainer.model.named_parameters()},
        "losses": losses,
        "records": [(record.outcome, record.loss_before, record.loss_after) for record in callback.records],
        "reasons": [record.reason for record in callback.records],
        "sizes": [layer.size_after for layer in callback.records[-1].layers],
    }


def plain(build: Callable[[], torch.nn.Module], **settings: Any) -> Callable[[Path], dict[str, Any]]:
    """A case that trains with some settings."""
    return lambda folder: ended(*train(build, folder, **settings))


def watched(folder: Path) -> dict[str, Any]:
    """What the reducer does, and what stays in memory."""
    watch = Watch()
    trainer, callback = train(tiny_mamba, folder, callbacks=(watch,), ddp_find_unused_parameters=False)
    size = sum(p.numel() for p in trainer.model.parameters())
    present = {id(p) for p in trainer.model.parameters()}
    gc.collect()
    alive = [ref() for ref in watch.old[1:] if ref() is not None and id(ref()) not in present]
    freed = watch.old[0]() is not watch.wrapper.reducer
    return {**ended(trainer, callback), "buckets": watch.buckets, "size": size, "stale": len(alive), "freed": freed}


def without_rebuild(folder: Path) -> dict[str, Any]:
    """The negative control: nobody tells the wrapper."""
    commit = data_parallel.ReducerChange.commit
    data_parallel.ReducerChange.commit = lambda change: None
    try:
        return ended(*train(tiny_mamba, folder))
    finally:
        data_parallel.ReducerChange.commit = commit


def static_graph(folder: Path) -> dict[str, Any]:
    """A wrapper with a static graph and gradients that are views of the buckets."""
    from accelerate import DistributedDataParallelKwargs

    class StaticTrainer(Trainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.ddp_handler = DistributedDataParallelKwargs(
                static_graph=True, gradient_as_bucket_view=True, find_unused_parameters=False
            )

    original, globals()["Trainer"] = Trainer, StaticTrainer
    try:
        return ended(*train(tiny_mamba, folder))
    finally:
        globals()["Trainer"] = original


def refused(folder: Path, change: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The message that a process stops with."""
    try:
        train(tiny_mamba, folder, **change())
    except CompreSSMError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def different_settings(folder: Path) -> dict[str, Any]:
    """Processes with another tolerance each."""
    return refused(folder, lambda: {"config": {"keep_ratio": 0.5 + 0.1 * RANK}})


def different_versions(folder: Path) -> dict[str, Any]:
    """One process has another version of a library."""
    from hf_compressm.training import distributed

    installed = distributed.version
    if RANK == 1:
        distributed.version = lambda library: "0.0.1" if library == "accelerate" else installed(library)
    try:
        return refused(folder, dict)
    finally:
        distributed.version = installed


def broken_process(folder: Path) -> dict[str, Any]:
    """One process has a calibration batch without labels; all of them skip the checks and train on."""
    from hf_compressm.training import run

    global calibration_batch
    whole, tried = calibration_batch, run.require_loss
    # The trouble is one that a trial before the first step does not see.
    run.require_loss = lambda *args: None
    if RANK == 1:
        calibration_batch = lambda: {"input_ids": whole()["input_ids"]}  # noqa: E731
    try:
        return ended(*train(tiny_mamba, folder))
    finally:
        calibration_batch, run.require_loss = whole, tried


def nan_process(folder: Path) -> dict[str, Any]:
    """One process has an overflowing loss in its calibration; all of them skip the checks and train on."""
    from hf_compressm.compression.measure import calibration

    number = calibration._number
    if RANK == 1:
        calibration._number = lambda loss: number(loss * float("nan"))
    try:
        return ended(*train(tiny_mamba, folder))
    finally:
        calibration._number = number


def other_rounding(folder: Path) -> dict[str, Any]:
    """One process decomposes as another processor might: other signs, and other digits at the end."""
    from hf_compressm.systems import hankel

    svd = hankel.svd
    if RANK == 1:
        hankel.svd = lambda matrix: (-svd(matrix)[0], svd(matrix)[1] * (1 + 1e-12), -svd(matrix)[2])
    try:
        return ended(*train(tiny_mamba2, folder))
    finally:
        hankel.svd = svd


def loss_in_one_process(folder: Path) -> dict[str, Any]:
    """Only one process has calibration batches, which time-invariant layers need for the loss alone."""
    global calibration_batch
    whole = calibration_batch
    if RANK == 1:
        calibration_batch = lambda: None  # noqa: E731
    try:
        return ended(*train(partial(tiny_lru, norm="layer"), folder))
    finally:
        calibration_batch = whole


class Judge(TrainerCallback):
    """Gives an evaluation a metric of the step; worse after the cut in some processes only, if `apart`."""

    def __init__(self, apart: bool) -> None:
        self.apart = apart

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        late = state.global_step >= 6
        metrics["eval_error"] = float(late and RANK == 0) if self.apart else float(abs(state.global_step - 2))


def judged(folder: Path, apart: bool, **settings: Any) -> Trainer:
    """A training with evaluations that [`Judge`] has a say in; it is the first to hear of them."""
    args = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "error", "greater_is_better": False}
    return train(tiny_mamba, folder, first_callbacks=(Judge(apart),), **args, **settings)


def judged_apart(folder: Path) -> dict[str, Any]:
    """A cut that the evaluation of the first process alone calls bad."""
    return ended(*judged(folder, apart=True, config={"rollback_metric": "error", "rollback_tolerance": 0.5}))


def trained_again(folder: Path) -> dict[str, Any]:
    """The best model is one before the cut; it is trained and cut once more, in the same wrapper."""
    saves = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}
    trainer, callback = judged(folder, apart=False, **saves)
    assert [layer.state_size for layer in find_layers(trainer.model)] == [8, 8]
    trainer.args.load_best_model_at_end = False
    trainer.train()
    return ended(trainer, callback)


def power_sgd(folder: Path) -> dict[str, Any]:
    """A communication hook that remembers what it left out of every bucket."""
    from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

    class Register(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 1:
                memory = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
                data_parallel.wrappers_of(model)[0].register_comm_hook(memory, powerSGD_hook.powerSGD_hook)

    return ended(*train(tiny_mamba, folder, callbacks=(Register(),), ddp_find_unused_parameters=False))


def dying(folder: Path) -> dict[str, Any]:
    """The last process is killed inside the cut, after everything was prepared and before anything is written."""
    from hf_compressm.compression.cut import training_state

    commit = training_state.commit_together

    def die(changes, then=()):
        if RANK == WORLD - 1 and then:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(changes, then=then)

    training_state.commit_together = die
    return ended(*train(tiny_mamba, folder, save_strategy="steps", save_steps=2))


def resumed(folder: Path) -> dict[str, Any]:
    """What `dying` or `saving` left, resumed; with as many processes as there are now."""
    source = next(folder.parent.glob(f"{os.environ['RESUME_FROM']}-*/checkpoint-{os.environ['RESUME_STEP']}"))
    return ended(*train(tiny_mamba, folder, resume=str(source)))


def rolled_back(folder: Path) -> dict[str, Any]:
    """A cut that is judged too bad by all processes together, and taken back."""
    return ended(*train(tiny_mamba, folder, config={"rollback_tolerance": 1e-9, "keep_ratio": 0.1}))


# Cut after the steps 3 and 6, to half each time.
TWICE = {"window": (0, 6)}

CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "mamba": plain(tiny_mamba),
    "mamba2": plain(tiny_mamba2),
    "twice": plain(tiny_mamba, config=TWICE),
    "own_loss": plain(tiny_mamba2, trainer_class=OwnLoss),
    "lru": plain(partial(tiny_lru, norm="layer")),
    "lru_fitted": plain(partial(tiny_lru, norm="layer"), config={"fit_readout": True}),
    "mamba2_fitted": plain(tiny_mamba2, config={"fit_readout": True}),
    "gated": plain(partial(tiny_gated_delta_net, "qwen3_5")),
    "no_unused": plain(tiny_mamba, ddp_find_unused_parameters=False),
    "accumulation": plain(tiny_mamba, gradient_accumulation_steps=2),
    "compiled": plain(tiny_mamba, torch_compile=True, torch_compile_backend="eager"),
    "static_graph": static_graph,
    "watched": watched,
    "without_rebuild": without_rebuild,
    "different_settings": different_settings,
    "different_versions": different_versions,
    "broken_process": broken_process,
    "nan_process": nan_process,
    "other_rounding": other_rounding,
    "loss_in_one_process": loss_in_one_process,
    "judged_apart": judged_apart,
    "trained_again": trained_again,
    "power_sgd": power_sgd,
    "rolled_back": rolled_back,
    "saving": plain(tiny_mamba, save_strategy="steps", save_steps=7),
    "dying": dying,
    "resumed": resumed,
}


def run_cases(cases: dict[str, Callable[[Path], dict[str, Any]]]) -> None:
    """Run the cases that the command line names, and save what each process ended with."""
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    for case in sys.argv[2:]:
        torch.save(cases[case](target / f"{case}-{WORLD}"), target / f"{case}-{WORLD}-{RANK}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    # On a loaded machine the interpreter's end can meet a thread of gloo that still runs, and abort the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run_cases(CASES)
