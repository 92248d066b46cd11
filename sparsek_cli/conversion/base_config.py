"""What config.json says of a base: whether it can be converted, and as which family."""

from typing import Any

from sparsek_cli.converted import is_converted
from sparsek_cli.errors import UsageError
from sparsek_cli.families import TABLE, Row, check_supported
from sparsek_cli.families.causal import check_causal


def convertible(config: dict[str, Any]) -> Row:
    """The family of a config.json dictionary, if its model can be converted.

    Raises:
        UsageError: already converted, not a causal language model, or not a supported family.
    """
    model_type = str(config.get("model_type", ""))
    architectures = config.get("architectures") or []
    supported = ", ".join(sorted(TABLE))
    if is_converted(config):
        raise UsageError(
            "this checkpoint is already converted",
            hint="use it: `sparsek chat`; --again calibrates scorers for the weights it has now",
        )
    check_supported(model_type)
    causal = [name for name in architectures if name.endswith(("ForCausalLM", "LMHeadModel"))]
    if architectures and not causal:
        raise UsageError(
            f"{architectures[0]} is not a causal language model",
            hint=f"give a text-generation checkpoint of one of: {supported}",
        )
    row = TABLE.get(model_type)
    if row is None and "auto_map" in config:
        raise UsageError(
            f"model family '{model_type or 'unknown'}' needs code of its own (auto_map in "
            "config.json), which is not run",
            hint=f"name a model of a family that transformers knows by itself: {supported}",
        )
    if row is None:
        raise UsageError(
            f"model family '{model_type or 'unknown'}' is not supported",
            hint=f"supported families: {supported}",
        )
    check_causal(config)
    return row
