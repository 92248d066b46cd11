"""FSDP2 and DeepSpeed ZeRO in the Trainer's words, and what they cannot do."""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sparsek_cli.devices import world_size
from sparsek_cli.errors import UsageError

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import Launch
    from sparsek_cli.training.settings import Settings


def check_launch(settings: "Settings", *, cpu: bool) -> None:
    """Raises UsageError where a strategy cannot run as it was started; cpu: there is no GPU."""
    launch, processes = settings.execution.launch, world_size()
    strategy = launch.strategy
    if strategy == "ddp":
        if launch.offload:
            raise UsageError(
                "launch.offload needs something sharded", hint="set launch.strategy=fsdp or zero3"
            )
        return
    if processes == 1:
        raise UsageError(
            f"launch.strategy={strategy} shards a model over processes, and there is one",
            hint="start it with `torchrun --nproc-per-node N -m sparsek_cli finetune ...`",
        )
    if cpu:
        raise UsageError(
            f"launch.strategy={strategy} needs GPUs",
            hint="set launch.strategy=ddp to train on the CPU",
        )
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise UsageError(
            f"launch.strategy={strategy}: DeepSpeed is not installed",
            hint="`pip install deepspeed`, or set launch.strategy=fsdp",
        )
    for what, instead in _looks_inside(settings).items():
        raise UsageError(
            f"{what} looks into layers whose parameters are sharded",
            hint=f"set {instead}, or launch.strategy=ddp",
        )


def _looks_inside(settings: "Settings") -> dict[str, str]:
    """What of a request needs whole layers, and what to set in its place."""
    found = {}
    if settings.start.scorers == "refit":
        found["scorer_training=refit"] = "scorer_training=concurrent"
    if settings.held_out.questions:
        found["evaluation.questions"] = "evaluation.questions=0"
    return found


def sharding_arguments(
    launch: "Launch", model: Any, *, bf16: bool, max_grad_norm: float
) -> dict[str, Any]:
    """What TrainingArguments needs for a strategy; empty for ddp."""
    strategy, offload = launch.strategy, launch.offload
    if strategy == "fsdp":
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": sorted(_block_names(model)),
            "state_dict_type": "FULL_STATE_DICT",
            "cpu_offload": offload,
        }
        return {"fsdp": True, "fsdp_config": config}
    if strategy.startswith("zero"):
        return {"deepspeed": _deepspeed(int(strategy[-1]), offload, bf16, max_grad_norm)}
    return {}


def reshard(model: Any) -> None:
    """Gives back what a forward pass gathered: what is written into a gathered copy is lost."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):  # FSDP2's
            module.reshard()


def _block_names(model: Any) -> set[str]:
    """Class names of the transformer blocks: the parents of the attention modules."""
    from sparsek_cli.models import family_of

    attention = family_of(model.config).attention
    return {
        type(module).__name__
        for module in model.modules()
        if any(isinstance(child, attention) for child in module.children())
    }


def _deepspeed(stage: int, offload: bool, bf16: bool, max_grad_norm: float) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": bf16},
        "gradient_clipping": max_grad_norm or 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
    }
