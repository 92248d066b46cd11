"""The servers that can run a converted model: vLLM with its plugin, and transformers' own.

Nothing here imports either of them: what is installed is looked up, not loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

from sparsek_cli.errors import UsageError
from sparsek_cli.families.layers import FULL

VLLM, TRANSFORMERS = "vllm", "transformers"
ENGINES = (VLLM, TRANSFORMERS)
# What transformers' server needs beyond transformers.
_SERVER_PARTS = ("fastapi", "uvicorn", "openai")


def vllm_obstacle(config: Mapping[str, Any] | None = None) -> str | None:
    """Why vLLM cannot serve here, or cannot serve this model; None where it can.

    Args:
        config: config.json of a converted model; None asks about the installation alone.
    """
    for package, name in (("vllm", "vLLM"), ("sparsek_vllm", "the plugin sparsek-vllm")):
        if importlib.util.find_spec(package) is None:
            return f"{name} is not installed"
    if config is None:
        return None
    families = importlib.import_module("sparsek_vllm").FAMILIES
    family = str(config["model_type"]).removeprefix("sparsek_")
    block = config["sparsek"]
    if family not in families:
        return f"the plugin serves {', '.join(families)}, not {family}"
    if block.get("gate", "straight_through") != "straight_through":
        return f"vLLM's blocks have no room for gate {block['gate']}"
    if block.get("scorer", {}).get("type") == "random":
        return "the plugin serves no random scores"
    if config.get("quantization_config"):
        return "the plugin serves no quantised weights"
    if not set(config.get("layer_types") or ()) <= {FULL[0]}:
        return "the plugin serves no models that mix layers"
    return None


def transformers_obstacle() -> str | None:
    """Why transformers' server cannot run here, or None."""
    missing = [name for name in _SERVER_PARTS if importlib.util.find_spec(name) is None]
    return f"transformers' server needs {', '.join(missing)}" if missing else None


def choose(config: Mapping[str, Any] | None, asked: str = "auto") -> tuple[str, str]:
    """The server to start, and why it is this one.

    Args:
        config: config.json of a converted model; None: whatever model.
        asked: `auto`, or one of `ENGINES` to insist on it.

    Raises:
        UsageError: it is no name of a server, or cannot run; says what to install.
    """
    if asked not in ("auto", *ENGINES):
        raise UsageError(f"no server is called {asked!r}", hint=f"auto, {' or '.join(ENGINES)}")
    obstacle, other = vllm_obstacle(config), transformers_obstacle()
    if asked in ("auto", VLLM) and obstacle is None:
        return VLLM, "installed, with its plugin"
    if asked == VLLM:
        raise UsageError(
            f"vLLM cannot serve this: {obstacle}",
            hint="docs/guides/serving.md says how to install both; or leave --engine out",
        )
    if other is not None:
        raise UsageError(
            f"no server can run: {other}" + ("" if asked != "auto" else f"; {obstacle}"),
            hint="pip install 'transformers[serving]' (in a checkout: pip install -c "
            "constraints.txt -e '.[serve]'), one request at a time; or vLLM and sparsek-vllm",
        )
    return TRANSFORMERS, "asked for" if asked == TRANSFORMERS else str(obstacle)
