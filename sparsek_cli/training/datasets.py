"""What a run is trained and measured on, put together from a recipe's blocks of data."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsek_cli.data import ANSWER, IGNORED, TEXT
from sparsek_cli.data.copy_source import CopySource
from sparsek_cli.data.corpus import Corpus, load_corpus
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.mixture import HeldOut, Mixture
from sparsek_cli.data.packing import PackedDocuments, PackedSequence, PackedText
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.data.questions import Question, make_questions
from sparsek_cli.data.streams import STREAMS, check_tokenizer
from sparsek_cli.errors import UsageError
from sparsek_cli.training.settings import Settings

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_sources import Evaluation, Source, TextSource

# Facts per document of the questions that measure held-out recall.
_FACTS = 4
_ROLES = {"text": TEXT, "answer": ANSWER, "none": IGNORED}


def load_texts(
    sources: "Mapping[str, Source]",
    wanted: "Evaluation",
    tokenizer: Any,
    say: Callable[[str], None],
    *,
    seed: int,
) -> tuple[dict[str, Corpus], Corpus | None]:
    """The text sources by name, and the held-out text (None: no evaluation).

    Raises:
        UsageError: no sources, a source without text, or one of which all is held out.
    """
    if not sources:
        raise UsageError("no training data", hint="give --data FILE or a 'data' block in a recipe")
    texts = {
        name: _corpus(source, tokenizer, say)
        for name, source in sources.items()
        if source.kind == "text"
    }
    if wanted.files is not None or wanted.dataset is not None:
        return texts, _corpus(wanted, tokenizer, say)
    if wanted.held_out == 0 or not texts:
        return texts, None
    held: list[Corpus] = []
    for name, corpus in texts.items():
        texts[name], rest = corpus.split(wanted.held_out, seed)
        if not texts[name].total:
            raise UsageError(
                f"evaluation.held_out {wanted.held_out} leaves nothing of data.{name} to train on",
                hint="set it lower, or give evaluation.files",
            )
        if sources[name].weight > 0:
            held.append(rest)
    largest = max(held, key=lambda corpus: corpus.total, default=None)
    return texts, largest


@dataclass(frozen=True)
class Datasets:
    """What a run reads.

    Attributes:
        train: what is trained on.
        held_out: sequences for the held-out loss; None: it is not measured.
        questions: for held-out recall; empty: it is not measured.
    """

    train: Mixture
    held_out: HeldOut | None = None
    questions: Sequence[Question] = ()


def make_datasets(
    settings: Settings,
    texts: Mapping[str, Corpus],
    held_out: Corpus | None,
    tokenizer: Any,
    *,
    total: int,
    keeps_states: bool,
    say: Callable[[str], None],
) -> Datasets:
    """The datasets of a run.

    Args:
        texts, held_out: of `load_texts`.
        total: sequences to train on.
        keeps_states: whether layers carry a state from token to token: then the documents of a
            held-out sequence cannot be told apart.

    Raises:
        UsageError: see the parts.
    """
    length, seed = settings.start.length, settings.start.seed
    return Datasets(
        build_mixture(
            settings.sources, texts, tokenizer, total,
            length=length, seed=seed, joined=settings.joined,
        ),
        held_out_sequences(
            settings.sources, settings.held_out, held_out, tokenizer,
            length=length, seed=seed, say=say, joined=keeps_states,
        ),
        held_out_questions(settings.held_out, held_out, tokenizer, length=length, seed=seed),
    )  # fmt: skip


def build_mixture(
    blocks: "Mapping[str, Source]",
    texts: Mapping[str, Corpus],
    tokenizer: Any,
    total: int,
    *,
    length: int,
    seed: int,
    joined: bool = False,
) -> Mixture:
    """The training dataset of a recipe's sources: `total` sequences of `length` tokens."""
    sources: dict[str, Callable[[int], PackedSequence]] = {}
    weights: dict[str, float] = {}
    # By name, so that the order of the recipe's keys changes nothing.
    for name, block in sorted(blocks.items()):
        if block.weight == 0:
            continue  # only filler for others
        weights[name] = block.weight
        own_seed = (seed, zlib.crc32(name.encode()))
        if block.kind == "text":
            role = _ROLES[block.loss]
            sources[name] = PackedText(texts[name], length, own_seed, role)
            continue
        sources[name] = PackedDocuments(
            _generator(block, texts, tokenizer),
            length,
            own_seed,
            document_length=getattr(block, "document_length", None),
            pad_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
    if not sources:
        raise UsageError("every data source has weight 0", hint="give one of them a weight")
    learned = [texts[n] for n in sources if blocks[n].kind == "text" and blocks[n].loss != "none"]
    if any(len(corpus) == corpus.total for corpus in learned):
        raise UsageError(
            "there is nothing to learn: every document of a text source is a single token",
            hint="name longer text",
        )
    return Mixture(sources, weights, total, seed, joined=joined)


def held_out_sequences(
    sources: "Mapping[str, Source]",
    wanted: "Evaluation",
    held_out: Corpus | None,
    tokenizer: Any,
    *,
    length: int,
    seed: int,
    say: Callable[[str], None],
    joined: bool = False,
) -> HeldOut | None:
    """What the held-out loss is measured on: text, else the first stream, else None.

    Text without a token to predict measures nothing, which is said. `joined`: see `HeldOut`.
    """
    count = wanted.sequences
    if held_out is not None:
        packed = PackedText(held_out, length, (seed,))
        found = HeldOut(packed, min(count, packed.per_epoch), joined=joined)
        if found.has_targets():
            return found
        say(
            f"held-out loss not measured: of {held_out.total:,} held-out tokens none can be "
            "predicted; set evaluation.held_out higher, or give evaluation.files"
        )
        return None
    streams = [block for _, block in sorted(sources.items()) if block.kind == "stream"]
    if not streams or wanted.held_out == 0:
        return None
    own_seed = (seed, zlib.crc32(b"held out"))
    packed = PackedDocuments(_stream(streams[0], tokenizer), length, own_seed)
    return HeldOut(packed, count, joined=joined)


def held_out_questions(
    wanted: "Evaluation", held_out: Corpus | None, tokenizer: Any, *, length: int, seed: int
) -> list[Question]:
    """The questions that `evaluation.questions` asks for.

    Raises:
        UsageError: the tokenizer has no chat template, or sequences are too short for a document.
    """
    if not wanted.questions or held_out is None:
        return []
    try:
        return make_questions(
            [seed], Filler.from_corpus(held_out, tokenizer),
            length=length, needles=_FACTS, count=wanted.questions,
            phrasings=phrasings("calibration"),
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(
            f"evaluation.questions: {error}", hint="set it to 0, or sequence_length higher"
        ) from error


def _corpus(block: "TextSource", tokenizer: Any, say: Callable[[str], None]) -> Corpus:
    return load_corpus(
        block.files if block.files is not None else block.dataset,
        tokenizer,
        name=block.name,
        split=block.split,
        column=block.column,
        max_tokens=getattr(block, "max_tokens", None),
        say=say,
    )


def _stream(block: Any, tokenizer: Any) -> Callable:
    try:
        check_tokenizer(block.stream, tokenizer)
        return STREAMS[block.stream](**block.options.model_dump())
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"stream '{block.stream}': {error}",
            hint="`sparsek recipes schema finetune` says which settings there are",
        ) from error


def _generator(block: Any, texts: Mapping[str, Corpus], tokenizer: Any) -> Callable:
    if block.kind == "stream":
        return _stream(block, tokenizer)
    if block.kind == "copies":
        return CopySource(texts[block.filler], block.passage)
    try:
        from sparsek_cli.data.needle_source import NeedleSource

        return NeedleSource(tokenizer, texts[block.filler], **block.options.model_dump())
    except (TypeError, ValueError) as error:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                f"data of kind '{block.kind}' are questions and answers, and {error}",
                hint="name a recipe that learns from text alone, as --recipe lora or scorers; or "
                "put a chat template beside the weights (chat_template.jinja)",
            ) from error
        raise UsageError(
            f"data options of kind '{block.kind}': {error}",
            hint="`sparsek recipes schema finetune` says which settings there are",
        ) from error
