"""What a finetune recipe learns from and is measured on: sources of data, held-out text."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictInt,
    model_serializer,
    model_validator,
)

from sparsek_cli.recipes.limits import LONGEST, MOST_FACTS
from sparsek_cli.recipes.scalars import Count, Float, Length, NotNegative, Share, Whole


class Strict(BaseModel):
    """A block in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class SourceBlock(Strict):
    """What every source has."""

    weight: NotNegative = Field(
        1.0, description="share of the training sequences, relative to the other sources"
    )


class TextSource(SourceBlock):
    """Documents, packed back to back; a document never sees its neighbours."""

    kind: Literal["text"] = Field(description="text, needles, copies or stream")
    files: str | list[str] | None = Field(
        None, description="files, folders or globs (.jsonl .txt .md .py .parquet, each also .zst)"
    )
    dataset: str | None = Field(None, description="hub dataset id, read by streaming")
    name: str | None = Field(None, description="configuration of the hub dataset")
    split: str = Field("train", description="split of the hub dataset")
    column: str | None = Field(None, description="column that holds the text; default: text")
    loss: Literal["text", "answer", "none"] = Field(
        "text", description="which mean these tokens count in"
    )
    max_tokens: Count | None = Field(
        None, description="stop reading after this many tokens (needed for a large hub dataset)"
    )

    @model_validator(mode="after")
    def _one_place(self) -> "TextSource":
        if (self.files is None) == (self.dataset is None):
            raise ValueError("needs either 'files' or 'dataset'")
        return self


def _ascending(ends: tuple[int, int]) -> tuple[int, int]:
    if ends[0] > ends[1]:
        raise ValueError("should be the fewest and the most, in this order")
    return ends


Split = Literal["calibration", "held_out", "unseen"]
Gap = Annotated[Float, Field(ge=1, le=LONGEST)]
Facts = Annotated[StrictInt, Field(ge=1, le=MOST_FACTS)]
FactRange = Annotated[tuple[Facts, Facts], AfterValidator(_ascending)]
Range = Annotated[tuple[Length, Length], AfterValidator(_ascending)]


class Options(Strict):
    """Settings of a generator of data; what is not given is the generator's own."""

    @model_serializer(mode="wrap")
    def _given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class NeedleOptions(Options):
    """How many facts, how they are told and asked for (data/needle_source.py)."""

    needles: FactRange | None = Field(
        None, description="fewest and most facts hidden in a document"
    )
    facts: FactRange | None = Field(None, description="fewest and most of a key-value document")
    questions: Facts | None = Field(None, description="most questions about one document")
    documents: Annotated[list[Facts], Field(min_length=1)] | None = Field(
        None, description="each call makes documents of 1/n of its length, n drawn from these"
    )
    splits: Annotated[list[Split], Field(min_length=1)] | None = Field(
        None, description="phrasings to use, by split"
    )
    key_values: Share | None = Field(
        None, description="share of calls that make key-value documents"
    )
    distractors: Share | None = Field(
        None, description="share of documents with facts that nobody asks about"
    )
    open_words: Share | None = Field(
        None, description="how often a key or value is a word of the filler"
    )
    generated: Share | None = Field(None, description="share of documents in generated text")
    repeats: Share | None = Field(
        None, description="share of key-value documents that repeat facts instead of asking"
    )


class StreamOptions(Options):
    """How far apart tags and signals are (data/streams.py)."""

    tags: Gap | None = Field(None, description="mean symbols from one tag to the next")
    signals: Gap | None = Field(None, description="the same of signals")


class NeedleBlock(SourceBlock):
    """Facts hidden in filler text and questions about them (data/needle_source.py)."""

    kind: Literal["needles"] = Field(description="text, needles, copies or stream")
    filler: str = Field(description="name of the text source that the filler comes from")
    options: NeedleOptions = Field(
        default_factory=NeedleOptions,
        description="needles, facts, questions, documents, splits, key_values, distractors, "
        "open_words, generated, repeats: how many facts, how they are told and asked for",
    )
    document_length: Length | None = Field(
        None, description="tokens per document, several packed per sequence; default: one"
    )


class CopyBlock(SourceBlock):
    """A passage, something in between, and the passage again."""

    kind: Literal["copies"] = Field(description="text, needles, copies or stream")
    filler: str = Field(description="name of the text source that passages come from")
    passage: Range = Field((32, 128), description="shortest and longest passage, in tokens")
    document_length: Length | None = Field(
        None, description="tokens per document, several packed per sequence; default: one"
    )


class StreamBlock(SourceBlock):
    """Generated sequences that are not text (data/streams.py); with `tokenizer` of that name."""

    kind: Literal["stream"] = Field(description="text, needles, copies or stream")
    stream: Literal["nucleotides", "series"] = Field(description="nucleotides or series")
    options: StreamOptions = Field(
        default_factory=StreamOptions,
        description="tags, signals: mean number of symbols from one tag (150) or signal (60) to "
        "the next",
    )


Source = Annotated[TextSource | NeedleBlock | CopyBlock | StreamBlock, Field(discriminator="kind")]


class Evaluation(Strict):
    """Held-out loss during and after training."""

    files: str | list[str] | None = Field(None, description="held-out text; as data.*.files")
    dataset: str | None = Field(None, description="held-out hub dataset id")
    name: str | None = Field(None, description="configuration of the hub dataset")
    split: str = Field("validation", description="split of the hub dataset")
    column: str | None = Field(None, description="column that holds the text; default: text")
    held_out: Share = Field(
        0.02,
        description="without files or dataset: this share of each text source's documents is "
        "kept out of training and used here (at least one document; 0: no evaluation); of "
        "streams, sequences that training never draws",
    )
    sequences: Count = Field(16, description="held-out sequences, of sequence_length each")
    questions: Whole = Field(
        0,
        description="questions about facts hidden in the held-out text, four to a "
        "document, in the phrasings that calibration knows; 0: recall is not measured (it needs a "
        "chat template)",
    )
    every: Whole = Field(0, description="evaluate every so many steps; 0: at the end only")
