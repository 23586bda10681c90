"""Kill a training process with SIGKILL again and again, resume it, and compare with the run that was never killed.

A third of the kills come at any moment, a third while a check runs (calibration, cut, optimizer), a third while a
checkpoint is written. Every attempt starts in a process of its own from the newest checkpoint that is whole, with a
model built at the original size.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# One thread each: a forked process must not inherit a running thread pool, and sums keep their order.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from common import make_mamba, parser, write_result  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

from hf_compressm import CompreSSMCallback, CompreSSMConfig, read_history  # noqa: E402
from hf_compressm.ops import compile_kernels  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parent.parent / "digits"))
from data import digit_sequences  # noqa: E402

STEPS = 40
CONFIG = CompreSSMConfig(strategy="fixed", keep_ratio=0.5, window=(0, 30), interval=10)
MOMENTS = ("any moment", "during a check", "during a save")
PHASES = ("starting", "training", "checking", "saving", "done")


def kill_after(seconds: float) -> None:
    """Let this process be killed without warning after some seconds."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


class Hook(TrainerCallback):
    """
    Notes the phase of the run and starts the clock of a kill when its phase begins.

    Args:
        phase (`multiprocessing.Value`): Index in `PHASES`, read by the parent after the kill.
        moment (`str`, *optional*): One of `MOMENTS`; nothing is killed when unset.
        delay (`float`): Seconds from the beginning of the phase to the kill.
        skip (`int`): Phases of that kind that are let go by.
    """

    def __init__(self, phase, moment: str | None, delay: float, skip: int) -> None:
        self.phase, self.moment, self.delay, self.skip = phase, moment, delay, skip

    def enter(self, phase: str) -> None:
        """A phase begins."""
        now = time.perf_counter()
        _SHORTEST[self.phase.value] = min(_SHORTEST[self.phase.value], now - _ENTERED[0])
        _ENTERED[0] = now
        self.phase.value = PHASES.index(phase)
        kind = {"checking": MOMENTS[1], "saving": MOMENTS[2]}.get(phase)
        if kind is not None and kind == self.moment:
            self.skip -= 1
            if self.skip < 0:
                kill_after(self.delay)


# Shortest stay in each phase, in seconds, and the moment at which the present one was entered.
_SHORTEST = multiprocessing.Array("d", [1.0] * len(PHASES))
_ENTERED = [0.0]


class Before(Hook):
    """Stands before the callback of the library."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.enter("training")
        if self.moment == MOMENTS[0]:
            kill_after(self.delay)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (10, 20, 30):
            self.enter("checking")


class After(Hook):
    """Stands behind it."""

    def on_step_end(self, args, state, control, **kwargs):
        self.enter("saving" if control.should_save else "training")

    def on_save(self, args, state, control, **kwargs):
        self.enter("training")


def train(folder: Path, phase, moment: str | None, delay: float, skip: int) -> None:
    """One attempt: resume from the newest checkpoint that is whole, or start."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    train_set, test_set = digit_sequences()
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=16,
        learning_rate=3e-3,
        save_steps=1,
        save_total_limit=3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    hooks = [kind(phase, moment, delay, skip) for kind in (Before, After)]
    trainer = Trainer(
        model=make_mamba(16, hidden_size=16, layers=2),
        args=args,
        train_dataset=train_set,
        eval_dataset=test_set,
        callbacks=[hooks[0], CompreSSMCallback(CONFIG), hooks[1]],
    )
    started = any(folder.glob("checkpoint-*"))
    _ENTERED[0] = time.perf_counter()
    # A kill behind the last save leaves a run that is over. The Trainer would take one step more than `max_steps`
    # on resuming it (transformers 5.23 looks at `max_steps` only after a step), so it is read instead.
    last = folder / f"checkpoint-{STEPS}"
    if last.is_dir():
        trainer.model = trainer.model_wrapped = type(trainer.model).from_pretrained(last)
        log_history = TrainerState.load_from_json(str(last / "trainer_state.json")).log_history
    else:
        trainer.train(resume_from_checkpoint=True if started else None)
        log_history = trainer.state.log_history
    phase.value = PHASES.index("done")
    outcome = {
        "losses": {entry["step"]: entry["loss"] for entry in log_history if "loss" in entry},
        "final_loss": trainer.evaluate()["eval_loss"],
        "state_size": trainer.model.config.state_size,
        "checks": [(r.step, r.outcome, r.loss_after) for r in read_history(folder)],
    }
    (folder / "outcome.json").write_text(json.dumps(outcome))


@dataclass
class Tally:
    """What the kills met."""

    phases: Counter = field(default_factory=Counter)
    moments: Counter = field(default_factory=Counter)
    kills: int = 0
    attempts: int = 0
    set_aside: int = 0


def attempt(folder: Path, moment: str | None = None, delay: float = 0.0, skip: int = 0) -> tuple[int, str]:
    """Run one attempt in a process of its own; returns its exit code (-9 for a kill) and its last phase."""
    context = multiprocessing.get_context("fork")
    phase = context.Value("i", 0)
    process = context.Process(target=train, args=(folder, phase, moment, delay, skip))
    process.start()
    process.join()
    return process.exitcode, PHASES[phase.value]


def killed_run(folder: Path, kills: int, durations: dict[str, float], generator: random.Random, tally: Tally) -> dict:
    """Kill a run up to `kills` times, then let it end; returns its outcome."""
    while tally.kills < kills:
        moment = MOMENTS[tally.attempts % 3]
        delay = generator.uniform(0, durations[moment])
        tally.attempts += 1
        # A resumed run may have a single check before it; saves it has many.
        skip = 0 if moment == MOMENTS[1] else generator.randrange(3)
        code, phase = attempt(folder, moment, delay, skip)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            raise SystemExit(f"an attempt failed by itself with exit code {code}")
        tally.kills += 1
        tally.phases[phase] += 1
        tally.moments[moment] += 1
    if not (folder / "outcome.json").exists():
        tally.attempts += 1
        code, _ = attempt(folder)
        if code != 0:
            raise SystemExit(f"the last attempt failed with exit code {code}")
    tally.set_aside += len(list(folder.glob("incomplete-*")))
    return json.loads((folder / "outcome.json").read_text())


def main() -> None:
    """Make the reference, kill as often as asked, compare, and write the table."""
    made = parser(__doc__)
    made.add_argument("--kills", type=int, default=200, help="SIGKILLs in all")
    made.add_argument("--kills-per-run", type=int, default=25, help="SIGKILLs that one run has to survive")
    made.add_argument("--seed", type=int, default=0, help="seed of the moments")
    made.add_argument("--no-table", action="store_true", help="print the figures as JSON instead of writing the table")
    options = made.parse_args()
    logging.set_verbosity_error()
    # Loaded once, here; every attempt inherits it.
    compile_kernels()
    generator, rows, figures = random.Random(options.seed), [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        attempt(folder / "reference")
        whole = time.perf_counter() - start
        reference = json.loads((folder / "reference" / "outcome.json").read_text())
        shortest = dict(zip(PHASES, _SHORTEST))
        durations = {MOMENTS[0]: whole / 2, MOMENTS[1]: shortest["checking"], MOMENTS[2]: shortest["saving"]}
        while sum(row["kills"] for row in figures) < options.kills:
            left = options.kills - sum(row["kills"] for row in figures)
            tally = Tally()
            run = folder / f"run-{len(figures)}"
            outcome = killed_run(run, min(options.kills_per_run, left), durations, generator, tally)
            losses, expected = outcome["losses"], reference["losses"]
            differences = [abs(losses[step] - expected[step]) for step in losses.keys() & expected.keys()]
            figures.append(
                {
                    "kills": tally.kills,
                    "phases": dict(tally.phases),
                    "set_aside": tally.set_aside,
                    "state_size": outcome["state_size"],
                    "expected_state_size": reference["state_size"],
                    "final_loss": outcome["final_loss"],
                    "expected_final_loss": reference["final_loss"],
                    "largest_loss_difference": max(differences),
                    "same_steps": losses.keys() == expected.keys() == {str(step) for step in range(1, STEPS + 1)},
                    "same_checks": [c[:2] for c in outcome["checks"]] == [c[:2] for c in reference["checks"]],
                }
            )
    if options.no_table:
        print(json.dumps(figures))
        return
    for number, row in enumerate(figures, start=1):
        rows.append(
            [
                str(number),
                str(row["kills"]),
                *(str(row["phases"].get(phase, 0)) for phase in PHASES[:4]),
                str(row["set_aside"]),
                f"{row['state_size']} ({row['expected_state_size']})",
                f"{row['final_loss']:.6f} ({row['expected_final_loss']:.6f})",
                f"{row['largest_loss_difference']:.1e}",
            ]
        )
    write_result(
        "kill_test",
        "Runs that were killed with SIGKILL and resumed",
        ["run", "kills", "while starting", "while training", "during a check", "during a save",
         "incomplete checkpoints", "state size (never killed)", "final loss (never killed)",
         "largest difference of a step's loss"],
        rows,
        figures,
        f"{STEPS} steps of a stock Mamba (N = 16) on digits, cut to a half after the steps 10, 20 and 30, with a "
        "checkpoint after every step. The incomplete checkpoints were recognised and set aside, never resumed from.",
    )  # fmt: skip


if __name__ == "__main__":
    main()
