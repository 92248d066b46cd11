"""The tokenizer of a folder that is written: the base's, or one that was named, whoever loads it.

Its files come along as they are, but AutoTokenizer also looks at the model's type, and a program
that has not imported this package does not know ours. So the class that the base gets is written
into tokenizer_config.json, and what then loads is compared with the base's.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsek_cli.checkpoint_files.template_steps import check_template
from sparsek_cli.errors import SparsekError
from sparsek_cli.loading import check_tokenizer, tokenizer_reason
from sparsek_cli.output.tokenizer_files import PROBES, facts_of, holds_tokenizer, make_load_as
from sparsek_cli.silence import quiet_transformers

if TYPE_CHECKING:
    from sparsek_cli.conversion.planned import Plan

NONE = "none beside the weights"
_HINT = (
    "mend its files, name another one with --tokenizer, or take them all out of the folder: "
    "without any, --calibrate none converts the weights alone"
)


def settle(plan: Plan, folder: Path) -> str:
    """Makes the tokenizer in `folder`, which holds the files of the plan's, load as that.

    Args:
        folder: the staged checkpoint, config.json included.

    Returns:
        What was found, in words.

    Raises:
        SparsekError: the base's does not load or fit its embedding, or the two still differ.
    """
    if not holds_tokenizer(folder):
        return NONE
    with quiet_transformers():
        try:
            base = _load_base(plan)
            facts = facts_of(base)
        except Exception as error:
            # Every tokenizer library fails in its own way; code of its own is not run either.
            why = tokenizer_reason(error)
            raise SparsekError(
                f"the tokenizer of {plan.tokenizer.name} does not load: {why}",
                hint=_HINT,
            ) from error
        if not base(PROBES[0]).input_ids:
            raise SparsekError(
                f"the tokenizer of {plan.tokenizer.name} makes no tokens of any text: files of it "
                "are missing",
                hint=_HINT,
            )
        check_template(base, plan.tokenizer.name)
        if not make_load_as(base, facts, folder):
            raise SparsekError(
                f"the tokenizer of {plan.tokenizer.name} would give other ids after converting",
                hint="load it with transformers, save it with save_pretrained into the base's "
                "folder, and convert that",
            )
    if rows := plan.config.get("vocab_size"):
        check_tokenizer(base, rows, plan.tokenizer.name)  # last: it may change the padding token
    of = "the base" if plan.own_tokenizer else plan.tokenizer.title
    return f"{type(base).__name__}, as of {of}"


def _load_base(plan: Plan) -> Any:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import (
        MODEL_IDS_TO_TOKENIZERS_BACKEND,
        TokenizersBackend,
    )

    if plan.config.get("model_type") != _model_type(plan.tokenizer.path):
        import sparsek_cli.models  # noqa: F401  (the base is a converted model, to convert --again)
    # Some models get another class by their name on the hub.
    source = plan.tokenizer.source.lower()
    named = any(fnmatch.fnmatch(source, pattern) for pattern in MODEL_IDS_TO_TOKENIZERS_BACKEND)
    load: Callable[..., Any] = TokenizersBackend if named else AutoTokenizer
    return load.from_pretrained(plan.tokenizer.path, trust_remote_code=False)


def _model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.exists() else None
