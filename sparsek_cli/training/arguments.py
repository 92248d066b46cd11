"""A run's settings in the words of transformers' Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from sparsek_cli.training.run_sizes import Sizes
from sparsek_cli.training.settings import Rates, Rhythm


def training_arguments(
    folder: Path,
    sizes: Sizes,
    rates: Rates,
    rhythm: Rhythm,
    *,
    seed: int,
    cpu: bool,
    evaluates: bool,
    data_workers: int,
    sharding: dict[str, Any],
) -> TrainingArguments:
    """What Trainer is told.

    Args:
        folder: where checkpoints go.
        evaluates: whether there is something held out.
        sharding: see `sharding_arguments`.
    """
    schedule = {"cosine": "cosine_with_min_lr", "constant": "constant_with_warmup"}
    cosine = {"min_lr_rate": rates.min_learning_rate} if rates.schedule == "cosine" else {}
    evaluates = evaluates and rhythm.evaluate > 0
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=sizes.batch.micro,
        per_device_eval_batch_size=sizes.batch.micro,
        gradient_accumulation_steps=sizes.accumulation,
        max_steps=sizes.steps,
        learning_rate=rates.learning_rate,
        lr_scheduler_type=schedule.get(rates.schedule, rates.schedule),
        lr_scheduler_kwargs=cosine,
        warmup_steps=rates.warmup_steps(sizes.steps),
        weight_decay=rates.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.95,
        max_grad_norm=rates.max_grad_norm,
        optim="adamw_torch" if cpu else "adamw_torch_fused",
        bf16=sizes.dtype == "bfloat16",
        use_cpu=cpu,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=rhythm.evaluate if evaluates else None,
        save_strategy="steps" if rhythm.save else "no",
        save_steps=rhythm.save or 500,
        logging_steps=rhythm.log,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to=list(rhythm.report_to) or "none",
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=data_workers,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        label_names=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        **sharding,
    )
