"""The recipe of `sparsek convert`: every key, its type, default and meaning."""

from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    model_validator,
)

from sparsek_cli.recipes.earlier_versions import SETTLED_CONVERT, with_recall, without_settled
from sparsek_cli.recipes.limits import LONGEST
from sparsek_cli.recipes.scalars import Length, Seed, Share, Switch

MOST = (1 << 31) - 1  # tokens of all texts: sizes still fit into numbers


def _tokens_or_share(value: object) -> object:
    if value is None or (type(value) is int and 1 <= value <= LONGEST):
        return value
    if isinstance(value, str):
        part, _, whole = value.partition("/")
        if part.isdecimal() and whole.isdecimal() and 0 < int(part) < int(whole):
            return str(Fraction(int(part), int(whole)))
    raise ValueError("should be a number of tokens like 512, or a share of the context like 1/16")


class ConvertRecipe(BaseModel):
    """Everything `sparsek convert` does, in one mapping."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)
    settled: ClassVar[dict[str, str]] = {key: hint for key, (_, hint) in SETTLED_CONVERT.items()}
    # They give way to a nearer `calibrate: none`; in one place with it they are refused.
    gives_way: ClassVar[dict[str, str]] = {
        "calibrate_tokens": "calibrate=none",
        "calibrate_length": "calibrate=none",
    }

    model: str | None = Field(None, description="folder, short name or hub id of the base model")
    out: str | None = Field(None, description="folder to write; default <name>-sparsek")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    tokenizer: str | None = Field(
        None,
        description="folder, short name or hub id whose tokenizer `out` gets; default: the one "
        "beside the weights, or in a GGUF file",
    )
    budget: Annotated[int | str | None, BeforeValidator(_tokens_or_share)] = Field(
        None,
        description="all slots per KV head, sinks + topk + window, instead of topk: tokens (512), "
        "or a share of the model's context (1/16, the default)",
    )
    topk: Length | None = Field(
        None,
        description="selected keys per KV head, a whole number >= 1; default: what window and "
        "sinks leave of the budget",
    )
    window: Length | None = Field(
        None,
        description="newest tokens always seen, itself included, a whole number >= 1; default "
        "a quarter of the budget, at most 128",
    )
    sinks: Annotated[StrictInt, Field(ge=0, le=LONGEST)] = Field(
        4, description="first tokens always seen, a whole number >= 0"
    )
    gate: Literal["straight_through", "log", "kv"] = Field(
        "straight_through",
        description="how scores enter attention: straight_through, log or kv (the paper's)",
    )
    cache_dtype: Literal["auto", "int8"] = Field(
        "auto",
        description="what the cache holds keys and values in: auto (the model's dtype) or int8 "
        "with a scale for each, about half the bytes",
    )
    budgets: Literal["per_head", "uniform"] = Field(
        "per_head",
        description="per_head: calibration gives heads that look far back more of the same total; "
        "uniform: topk for every head",
    )
    stand_ins: Switch = Field(
        True,
        description="calibration fits one pair per query head that stands in for what it no "
        "longer sees, beside the slots and for all texts; kept if whole models lose less with it",
    )
    calibrate: str = Field(
        "auto",
        description="text that scorers are fitted on: auto (generated, offline), none (neutral "
        "scorers: a plain window until fine-tuned), a file or folder, or a hub dataset",
    )
    calibrate_tokens: Annotated[StrictInt, Field(ge=1, le=MOST)] | None = Field(
        None, description="tokens of text to fit scorers on; default: by the model's width"
    )
    calibrate_length: Annotated[StrictInt, Field(ge=64, le=LONGEST)] | None = Field(
        None,
        description="tokens of the documents that choices are made on, as long as what will be "
        "read; default: the context, at most 32768 or four times the slots",
    )
    recall: Share = Field(
        0.65,
        description="how much what stands far back counts, and not running text, when calibration "
        "compares whole models: 1 is recall alone, 0 text alone; the report shows both ends",
    )
    again: Switch = Field(
        False,
        description="the model is converted already, and perhaps fine-tuned: calibrate scorers for "
        "the weights it has now; slots, cache and gate stay as they are where none are named",
    )
    scorers_only: Switch = Field(
        False,
        description="write the scorers alone, megabytes that name their base; `sparsek merge` puts "
        "them onto it",
    )
    copy_base: Switch = Field(
        False, alias="copy", description="copy the base weights instead of linking them"
    )
    overwrite: Switch = Field(False, description="replace `out` if it exists")
    device: str = Field("auto", description="where calibration runs: auto, cpu, cuda, cuda:N")
    dtype: str = Field(
        "auto", description="number format while calibrating: auto, bfloat16, float16, float32"
    )
    seed: Seed = Field(0, description="seed of the calibration text")

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, given: Any) -> Any:
        """Keys of earlier versions go where they say what is now always done."""
        return without_settled(with_recall(given), SETTLED_CONVERT)
