"""What a person sees while training: speed, loss, time left; and the end of a time limit."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

from sparsek_cli.reporter import Bar, Reporter


class ProgressReport(TrainerCallback):
    """Turns the Trainer's events into steps and lines, on the first process only.

    Args:
        reporter: where lines go. bar: one step of it is an optimiser step.
        tokens_per_step: over all processes.
    """

    def __init__(self, reporter: Reporter, bar: Bar, tokens_per_step: int):
        self.reporter, self.bar, self.tokens_per_step = reporter, bar, tokens_per_step
        self._shown: int | None = None
        self._marks: list[tuple[float, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._marks = [(time.monotonic(), state.global_step)]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._marks = [*self._marks[-20:], (time.monotonic(), state.global_step)]
        if self._shown is None:
            self.bar.describe("training", total=state.max_steps)
            self._shown = 0
        self.bar.advance(state.global_step - self._shown, rate=f"{self.rate():,.0f} tokens/s")
        self._shown = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        shown = [f"step {state.global_step}/{state.max_steps}"]
        if "loss" in logs:
            shown += [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
            if self.rate() > 0:
                left = (state.max_steps - state.global_step) * self.tokens_per_step / self.rate()
                shown += [f"{self.rate():,.0f} tokens/s", f"{_clock(left)} left"]
        elif "eval_loss" in logs:
            shown.append(f"held-out loss {logs['eval_loss']:.4f}")
            if "eval_answer_loss" in logs:
                shown.append(f"of answers {logs['eval_answer_loss']:.4f}")
            if "eval_recall" in logs:
                shown.append(f"recall {logs['eval_recall']:.1%}")
        else:
            return
        self.reporter.say("  ".join(shown))

    def rate(self) -> float:
        """Tokens per second over the last twenty steps; 0 before the first."""
        (first, low), (last, high) = self._marks[0], self._marks[-1]
        return (high - low) * self.tokens_per_step / max(last - first, 1e-9)


class TimeLimit(TrainerCallback):
    """Ends a run after `seconds`, on all processes after the same step."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._start = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        over = time.monotonic() - self._start >= self.seconds
        if args.world_size > 1:
            flag = torch.tensor(float(over), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            over = bool(flag)
        control.should_training_stop |= over


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
