"""The recipe in the words of transformers' Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments


def training_arguments(
    recipe: Any,
    folder: Path,
    *,
    steps: int,
    bf16: bool,
    cpu: bool,
    processes: int,
    evaluates: bool,
    sharding: dict[str, Any],
) -> TrainingArguments:
    """What Trainer is told.

    Args:
        folder: where checkpoints go.
        steps: optimiser steps of the whole run.
        processes: how many share the global batch.
        evaluates: whether there is something held out.
        sharding: see `sharding_arguments`.
    """
    warmup = recipe.warmup if recipe.warmup >= 1 else recipe.warmup * steps
    schedule = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    cosine = {"min_lr_rate": recipe.min_learning_rate} if recipe.schedule == "cosine" else {}
    evaluates = evaluates and recipe.evaluation.every > 0
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.batch_size // (recipe.micro_batch_size * processes),
        max_steps=steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=schedule.get(recipe.schedule, recipe.schedule),
        lr_scheduler_kwargs=cosine,
        warmup_steps=round(warmup),
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        bf16=bf16,
        use_cpu=cpu,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=recipe.evaluation.every if evaluates else None,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or 500,
        logging_steps=recipe.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=recipe.report_to or "none",
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.data_workers,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        **sharding,
    )
