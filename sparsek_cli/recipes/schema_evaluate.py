"""The recipe of `sparsek evaluate`: every key, its type, default and meaning."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sparsek_cli.recipes.earlier_versions import SETTLED_EVALUATE, without_settled
from sparsek_cli.recipes.limits import LONGEST, MOST_SEQUENCES
from sparsek_cli.recipes.scalars import Count, Float, Length, Seed, Switch

Names = Annotated[list[str], Field(min_length=1)]


class EvaluateRecipe(BaseModel):
    """What to measure, on what, against what."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    settled: ClassVar[dict[str, str]] = {key: hint for key, (_, hint) in SETTLED_EVALUATE.items()}
    # A key, and the one that takes its place where that is written nearer: beside the file, or in
    # a recipe that extends it.
    gives_way: ClassVar[dict[str, str]] = {"limits": "limit"}

    model: str | None = Field(
        None, description="folder, hub id or short name; default: the last model made here"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    tasks: Names = Field(
        ["ppl", "recall"], description="tasks and groups, see `sparsek evaluate --list`"
    )
    baselines: list[str] = Field(
        ["dense", "window", "random"],
        description="same weights under other policies: dense, window, random, snapkv, h2o, "
        "kvpress:NAME",
    )
    budgets: list[Count] = Field(
        [], description="pairs per layer and KV head to try; empty: the checkpoint's own"
    )
    limit: Count | None = Field(None, description="samples per task and length; default: all")
    limits: dict[str, Count] = Field(
        {},
        description="samples of single tasks, before `limit`; one given beside the recipe's file, "
        "or in a recipe that extends it, takes their place: {ppl: 2, recall_16: 16}",
    )
    lengths: list[Length] = Field(
        [], description="prompt lengths in tokens, for tasks that can be made at any length"
    )
    data: str | None = Field(
        None, description="folder with <config>/<split>.jsonl[.zst] and text/, instead of the hub"
    )
    text: list[str] = Field(
        [], description="files, folders or globs of text for ppl and as filler for needles"
    )
    max_length: Length | None = Field(
        None, description="most tokens of prompt and answer together; default: the model's own"
    )
    yarn: Annotated[Float, Field(gt=1, le=LONGEST)] | None = Field(
        None, description="stretch rotary positions: prompts may be so many times as long"
    )
    truncate: Literal["refuse", "left", "middle"] = Field(
        "refuse", description="prompts over max_length: refuse, or cut at the left or in the middle"
    )
    max_new_tokens: Length | None = Field(
        None, description="upper bound on generated answers, below each task's own"
    )
    chat_template: Literal["auto", "on", "off"] = Field(
        "auto", description="auto: for our own tasks when the tokenizer has one; on, off: for all"
    )
    batch_size: Annotated[StrictInt, Field(ge=1, le=MOST_SEQUENCES)] | Literal["auto"] = Field(
        "auto", description="prompts scored, answers written side by side; auto or a number"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    dtype: str = Field("auto", description="auto, bfloat16, float16 or float32")
    seed: Seed = Field(0, description="of generated samples and of the random baseline")
    out: str | None = Field(
        None, description="result folder; default: runs/evaluate/<model>/<settings>"
    )
    overwrite: Switch = Field(False, description="replace the results in `out`")

    @model_validator(mode="before")
    @classmethod
    def _forget(cls, given: Any) -> Any:
        """Keys of earlier versions go where they say what is now always done."""
        return without_settled(given, SETTLED_EVALUATE)

    @field_validator("chat_template", mode="before")
    @classmethod
    def _switch(cls, value: object) -> object:
        """YAML reads on and off as true and false."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value

    @field_validator("tasks", "baselines", "budgets", "lengths", "text", mode="before")
    @classmethod
    def _words(cls, value: object, info: ValidationInfo) -> object:
        """`a,b` and a single value are lists too, so that flags and words need no brackets."""
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",") if part.strip()]
            numbers = info.field_name in ("budgets", "lengths")
            return [int(p) if numbers and p.isdecimal() else p for p in parts]
        return [value] if isinstance(value, int) else value

    @field_validator("tasks", "baselines", "budgets", "lengths", "text", mode="after")
    @classmethod
    def _once(cls, value: list) -> list:
        """What is named twice is measured once."""
        return list(dict.fromkeys(value))
