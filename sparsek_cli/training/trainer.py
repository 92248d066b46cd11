"""transformers' Trainer with our loss: the same run on any process count, and after a kill."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sparsek_cli import disk
from sparsek_cli.data.mixture import Mixture
from sparsek_cli.data.packing import collate
from sparsek_cli.data.questions import Question
from sparsek_cli.errors import DAMAGED_OR_TOO_LARGE, SparsekError
from sparsek_cli.training.losses.future_attention import FutureAttention
from sparsek_cli.training.losses.objectives import Objective, count_targets
from sparsek_cli.training.measure import recalled
from sparsek_cli.training.parameters import optimizer_groups
from sparsek_cli.training.sharding import reshard
from sparsek_cli.training.storage import checkpoints, state


@contextmanager
def _accepted(model: torch.nn.Module) -> Iterator[None]:
    """Within the block Trainer takes a quantised model whose packed weights do not learn.

    It asks for adapters that transformers loaded; scorers, and adapters put in by PEFT, do as well.
    """
    if not getattr(model, "is_quantized", False):
        yield
        return
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


class SparsekTrainer(Trainer):
    """Loss means over the whole global batch, data in a fixed order, checkpoints in one rename.

    Args:
        rates: peak rate of the base, of scorers, and AdamW's decay, for `optimizer_groups`.
        batch_size: sequences per step.
        objective: how loss sums become one number.
        future: what gives the scores a loss of their own, or None.
        start: the parameters that learn, as they were before the run; None: not kept.
        questions: what recall is measured with; empty: it is not.
        kwargs: what Trainer takes.
    """

    def __init__(
        self,
        *,
        rates: tuple[float, float, float],
        batch_size: int,
        objective: Objective,
        future: FutureAttention | None = None,
        start: dict[str, torch.Tensor] | None = None,
        questions: Sequence[Question] = (),
        **kwargs: Any,
    ):
        with _accepted(kwargs["model"]):
            super().__init__(data_collator=collate, **kwargs)
        # The loss is divided by the counts of the whole global batch, in `compute_loss`.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self.objective, self.future, self.start = objective, future, start
        self.rates, self.batch_size = rates, batch_size
        self.questions = questions
        self.last_loss: torch.Tensor | None = None
        self._unchecked: tuple[torch.Tensor, list[int]] | None = None
        self._step_loss: torch.Tensor | None = None
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer's; FSDP leaves weights in float32 and autocast decides, as without it."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            # Its own policy would round the scorers' weights to bf16 before every pass.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's."""
        with nullcontext() if self.future is None else self.future.attached():
            return super().train(*args, **kwargs)

    # Data: item i of the mixture is the i-th sequence of the run, whoever asks for it.

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        counts = sum(count_targets(batch["roles"]) for batch in batch_samples).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        return counts

    # Loss.

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The share of this micro-batch in the loss of the global batch."""
        sums = model(**inputs)["sums"]
        loss = self.objective.combine(sums, num_items_in_batch)
        # DDP and FSDP average gradients over processes; ours is a sum over them.
        loss = loss * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: dict, *args: Any, **kw: Any) -> Any:
        """As Trainer's; a loss that is not finite stops the run and names its sequences."""
        indices = inputs.pop("indices").tolist()
        self.stop_if_not_finite()
        loss = super().training_step(model, inputs, *args, **kw)
        # Looked at one micro-batch later, so that the GPU is never waited for.
        self._unchecked = (loss.detach(), indices)
        known = 0.0 if self._step_loss is None else self._step_loss
        self._step_loss = loss.detach() + known
        if self.accelerator.sync_gradients:
            self.last_loss, self._step_loss = self._step_loss, None
        return loss

    def stop_if_not_finite(self) -> None:
        """Raises SparsekError if the last micro-batch gave NaN or infinity."""
        if self._unchecked is None:
            return
        loss, indices = self._unchecked
        self._unchecked = None
        if torch.isfinite(loss):
            return
        data: Mixture = self.train_dataset
        named = ", ".join(f"{index} ({data.name_of(index)})" for index in indices)
        step = indices[0] // self.batch_size + 1
        if step == 1:  # nothing is learnt yet, so that no rate is to blame
            raise SparsekError(
                f"the loss is {loss.item()} before anything is learnt, in sequences {named}",
                hint=DAMAGED_OR_TOO_LARGE,
            )
        raise SparsekError(
            f"the loss became {loss.item()} at step {step}, in sequences {named}",
            # Not --resume, which takes the same recipe alone: it would end here again.
            hint="lower learning_rate, or raise warmup; with dtype: bfloat16 try float32",
        )

    def final_loss(self) -> float:
        """Training loss of the last step, over all processes."""
        if self.last_loss is None:
            return float("nan")
        return self.accelerator.reduce(self.last_loss.clone(), reduction="mean").item()

    @torch.no_grad()
    def put_back_start(self) -> None:
        """The parameters as they were before the run."""
        model = self.accelerator.unwrap_model(self.model)
        reshard(model)
        for name, tensor in self.start.items():
            parameter = model.get_parameter(name)
            parameter.copy_(state.sharded_like(tensor, parameter))

    def full_state(self) -> dict[str, torch.Tensor] | None:
        """All weights where they are sharded (every process must call this), else None."""
        if not self._sharded():
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)

    # Optimiser.

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the groups of parameters.py."""
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = optimizer_groups(self.model if model is None else model, *self.rates)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    # Evaluation: means over tokens, not over batches.

    @torch.no_grad()
    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict:
        """Held-out loss per token (nats) and recall (share)."""
        metrics = self._measure(metric_key_prefix)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _measure(self, prefix: str) -> dict[str, float]:
        data = self.eval_dataset
        world, rank = self.args.world_size, self.args.process_index
        was_training = self.model.training
        self.model.eval()
        total = torch.zeros(4, dtype=torch.float64, device=self.args.device)
        each = self.args.per_device_eval_batch_size
        # Every process makes the same number of forward passes: FSDP hangs otherwise.
        for first in range(0, len(data), each * world):
            start = first + rank * each
            items = [data[min(i, len(data) - 1)] for i in range(start, start + each)]
            inputs = collate(items)
            inputs["roles"][max(0, min(each, len(data) - start)) :] = 0
            inputs.pop("indices")
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                sums = self.model_wrapped(**inputs)["sums"]
            total[:2] += sums[:2].double()
            total[2:] += count_targets(inputs["roles"])[:2]
        total = self.accelerator.reduce(total, reduction="sum")
        (text, answers), counts = total[:2], total[2:]
        metrics = {f"{prefix}_loss": ((text + answers) / counts.sum().clamp(min=1)).item()}
        if counts[1] > 0:
            metrics[f"{prefix}_answer_loss"] = (answers / counts[1]).item()
        if self.questions:
            tokens = each * len(data[0]["input_ids"])
            with self.compute_loss_context_manager():
                right = recalled(self.model, self.questions, batch_tokens=tokens)
            metrics[f"{prefix}_recall"] = float(right.mean())
        self.model.train(was_training)
        return metrics

    # Checkpoints.

    def _get_output_dir(self, trial: Any) -> str:
        return getattr(self, "_writing", None) or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.stop_if_not_finite()
        loss = self.final_loss()
        home = Path(self.args.output_dir)
        writing = home / "writing"
        self._writing = str(writing)
        try:
            with disk.os_errors():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                name = f"checkpoint-{self.state.global_step}"
                checkpoints.save_loss(loss, writing / name)
                shutil.rmtree(home / name, ignore_errors=True)
                os.replace(writing / name, home / name)
                checkpoints.keep_newest(home, 1)
        except OSError as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise checkpoints.disk_error(error, home) from error
        finally:
            self._writing = None
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            checkpoints.save_trained(model, Path(output_dir), state_dict)

    def _sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.is_fsdp_enabled or self.args.should_save:
            state.save_optimizer(
                self.optimizer, self.lr_scheduler, Path(output_dir), write=self.args.should_save
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            state.load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))
        if checkpoint is not None:
            # What the run reports if it was killed after its last step.
            loss = checkpoints.load_loss(Path(checkpoint))
            self.last_loss = torch.tensor(loss, device=self.args.device)

    def _save_rng_state(self, output_dir: str) -> None:
        state.save_generators(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.load_generators(Path(checkpoint), self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.load_trained(self.model, Path(resume_from_checkpoint))
