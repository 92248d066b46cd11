"""What a finetune recipe learns from and is measured on: sources of data, held-out text."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveInt,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Strict(BaseModel):
    """A block in which an unknown key is a mistake."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class SourceBlock(Strict):
    """What every source has."""

    weight: NonNegativeFloat = Field(
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
    max_tokens: PositiveInt | None = Field(
        None, description="stop reading after this many tokens (needed for a large hub dataset)"
    )

    @model_validator(mode="after")
    def _one_place(self) -> "TextSource":
        if (self.files is None) == (self.dataset is None):
            raise ValueError("needs either 'files' or 'dataset'")
        return self


class NeedleBlock(SourceBlock):
    """Facts hidden in filler text and questions about them (data/needle_source.py)."""

    kind: Literal["needles"] = Field(description="text, needles, copies or stream")
    filler: str = Field(description="name of the text source that the filler comes from")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="needles, facts, questions, documents, splits, key_values, distractors, "
        "open_words, generated, repeats: how many facts, how they are told and asked for",
    )
    document_length: PositiveInt | None = Field(
        None, description="tokens per document, several packed per sequence; default: one"
    )


class CopyBlock(SourceBlock):
    """A passage, something in between, and the passage again."""

    kind: Literal["copies"] = Field(description="text, needles, copies or stream")
    filler: str = Field(description="name of the text source that passages come from")
    passage: tuple[PositiveInt, PositiveInt] = Field(
        (32, 128), description="shortest and longest passage, in tokens"
    )
    document_length: PositiveInt | None = Field(
        None, description="tokens per document, several packed per sequence; default: one"
    )


class StreamBlock(SourceBlock):
    """Generated sequences that are not text (data/streams.py); with `tokenizer` of that name."""

    kind: Literal["stream"] = Field(description="text, needles, copies or stream")
    stream: Literal["nucleotides", "series"] = Field(description="nucleotides or series")
    options: dict[str, Any] = Field(
        default_factory=dict,
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
    held_out: Fraction = Field(
        0.02,
        description="without files or dataset: this share of each text source's documents is "
        "kept out of training and used here (at least one document; 0: no evaluation); of "
        "streams, sequences that training never draws",
    )
    sequences: PositiveInt = Field(16, description="held-out sequences, of sequence_length each")
    questions: int = Field(
        0,
        ge=0,
        description="questions about facts hidden in the held-out text, four to a "
        "document, in the phrasings that calibration knows; 0: recall is not measured (it needs a "
        "chat template)",
    )
    every: int = Field(0, ge=0, description="evaluate every so many steps; 0: at the end only")
