"""README.md of a converted checkpoint."""

from collections.abc import Mapping
from typing import Any

from sparsek_cli import quantised
from sparsek_cli.byte_units import size as byte_size
from sparsek_cli.conversion.planned import Plan


def model_card(plan: Plan, report: Mapping[str, Any] | None, scorers: str = "") -> str:
    """Model card with front matter that the hub reads.

    Args:
        plan: the conversion.
        report: what calibration measured; None without calibration.
        scorers: what to say of scorers that came from elsewhere.
    """
    size = plan.geometry
    source = plan.base.title
    hub = f"base_model: {source}\n" if "/" in source else ""
    kept, dense = (byte_size(plan.cache_bytes(size.context, dense=d)) for d in (False, True))
    name = plan.out.name
    return f"""---
{hub}library_name: transformers
pipeline_tag: text-generation
tags:
- sparsek
- sparse-attention
---

# {name}

{source} with SparseK attention (arXiv 2406.16747): each KV head keeps {plan.sinks} first tokens,
the newest {plan.window}, and {_selected(plan)} that a learned score ranks highest. The cache
holds {plan.budget} tokens per KV head at any length: {kept} in {plan.slot_dtype} for the whole
model, where the dense one holds {dense} at its context of {size.context:,} tokens.

{scorers or _calibration(plan, report)}

## Use

The `sparsek` package must be installed.

```python
import sparsek_cli.models
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Where nothing imports `sparsek_cli`, as in other tools, transformers asks whether it may load the
file that leads there: answer with `trust_remote_code=True` for the model, and with
`trust_remote_code=False` for the tokenizer, which does not need it.

```
sparsek chat {name}
sparsek evaluate {name} --tasks ppl,recall --baselines dense,window,random
sparsek finetune {name} OUT --recipe lora --data FILE
```

## Files

{_files(plan)}
`sparsek.safetensors` holds the scorers and slopes, `sparsek.yaml` the settings of this conversion.
The base model's licence applies to its weights.
"""


def _selected(plan: Plan) -> str:
    if plan.calibrate_tokens and plan.calibration.per_head:
        return f"on average {plan.topk} others"
    return f"the {plan.topk} others"


def _files(plan: Plan) -> str:
    if plan.base.source == "gguf":
        return (
            "`base-*.safetensors` are the weights of a GGUF file, unpacked to "
            f"{plan.geometry.dtype}."
        )
    how = quantised.described(plan.config)
    how = f", quantised ({how})" if how else ""
    return (
        f"`base-*.safetensors` are the base model's weights{how}, byte for byte; they may share "
        "disk space with\nthe base (reflink or hard link), so replace them rather than editing "
        "them in place."
    )


def _how(plan: Plan) -> str:
    if plan.calibration.method.scorer == "linear":
        return "in closed form"
    return "the base untouched"


def _calibration(plan: Plan, report: Mapping[str, Any] | None) -> str:
    if not report:
        return (
            "The scorers are neutral: without calibration or fine-tuning the selected tokens are "
            "simply\nthe newest ones, as in a sliding window."
        )
    return (
        f"Scorers were calibrated on {plan.calibrate_tokens:,} tokens "
        f"(`{plan.calibration.text}`), {_how(plan)}.\nOn held-out documents its "
        f"predictions diverge from the dense\nmodel's by {report['text_loss']:.3f} nats per token "
        f"of text and {report['answer_loss']:.3f} where the answer stands far back;\na plain "
        f"window of the same size by {report['window_text_loss']:.3f} and "
        f"{report['window_answer_loss']:.3f}."
    )
