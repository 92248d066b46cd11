"""What a run will do, checked and worked out before any weights are read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsek_cli import hub, quantised
from sparsek_cli.data.corpus import Corpus
from sparsek_cli.data.streams import STREAMS, stream_tokenizer
from sparsek_cli.devices import choose_device, choose_dtype, world_size
from sparsek_cli.errors import UsageError
from sparsek_cli.families.layers import has_states
from sparsek_cli.families.positions import context_length, learned_positions
from sparsek_cli.loading import load_tokenizer
from sparsek_cli.output.place import check_local
from sparsek_cli.reporter import Reporter, Silent
from sparsek_cli.training.datasets import load_texts
from sparsek_cli.training.model import model_without_weights
from sparsek_cli.training.parameters import choose_parameters
from sparsek_cli.training.run_sizes import Sizes, sizes_of
from sparsek_cli.training.settings import Settings, settings_of
from sparsek_cli.training.sharding import check_launch
from sparsek_cli.training.storage.inputs import as_it_began, computed, inputs_of
from sparsek_cli.training.storage.output import check_scorers_apart
from sparsek_cli.training.storage.resume import check_output, checkpoint_to_resume, part_folder

if TYPE_CHECKING:
    from sparsek_cli.recipes.schema_finetune import FinetuneRecipe


@dataclass(frozen=True)
class Plan:
    """A run that has been checked: what it will do, and what it needs for that.

    Attributes:
        request: the recipe as plain data, for records. sizes: what follows from it.
        inputs: hashes of what is read, which a continuation compares, and where it is computed.
        settings: the request in parts, as what is below reads them.
        out: the folder to appear. source: where weights come from; None: random ones.
        tokenizer, texts, held_out: data, tokenized. device, bf16: where and how it is computed.
        checkpoint: where an unfinished run goes on; None: a new run.
    """

    request: dict[str, Any]
    inputs: dict[str, str]
    settings: Settings
    sizes: Sizes
    out: Path
    source: hub.Checkpoint | None
    tokenizer: Any
    texts: dict[str, Corpus]
    held_out: Corpus | None
    device: torch.device
    bf16: bool
    checkpoint: Path | None = None

    def text(self) -> str:
        """For a person."""
        return self.sizes.text()

    def data(self) -> dict[str, Any]:
        """For --json."""
        return self.sizes.data()


def plan(
    recipe: "FinetuneRecipe", reporter: Reporter | None = None, *, resume: bool = False
) -> Plan:
    """Checks a request and works out its sizes; text is read, no weights are.

    Args:
        recipe: validated.
        resume: continue from the newest checkpoint of an unfinished run of the same recipe.

    Raises:
        UsageError: the request cannot be carried out as written.
    """
    reporter = reporter or Silent()
    if recipe.init == "pretrained" and recipe.model is None:
        raise UsageError("MODEL is missing", hint="name a folder, short name or hub id")
    named = f"{_base_name(recipe)}-finetuned" if recipe.out is None else recipe.out
    check_local(named)
    out = Path(os.path.expanduser(named))
    source = None if recipe.model is None else hub.resolve(recipe.model)
    where = None if source is None else source.path
    settings = settings_of(recipe)
    start = settings.start
    check_output(
        out, resume=resume, overwrite=recipe.overwrite, model=where, contents=start.contents
    )
    _check_reporters(recipe.report_to)
    device = choose_device(recipe.device)
    check_launch(settings, cpu=device.type == "cpu")
    bf16 = choose_dtype(recipe.dtype, device) == torch.bfloat16
    if resume:
        auto = recipe.dtype == "auto"
        bf16 = as_it_began(part_folder(out), device.type, bf16=bf16, auto=auto, say=reporter.say)
    tokenizer = _tokenizer(recipe.tokenizer, source)
    texts, held_out = load_texts(
        recipe.data, recipe.evaluation, tokenizer, reporter.say, seed=recipe.seed
    )
    # From here on a few words at a time are tokenised, in forked data workers, which would wait
    # for ever for the threads of their parent.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    model = model_without_weights(start, tokenizer, source)
    if not settings.joined and has_states(getattr(model.config, "layer_types", None)):
        raise UsageError(
            f"some layers of {model.config.model_type.removeprefix('sparsek_')} keep a state, "
            "which would carry one document of a sequence into the next",
            hint="set documents=joined: a document then sees those before it in its sequence",
        )
    quantised.check_training(
        model.config, start.train, merges=start.lora.merge, processes=world_size()
    )
    if start.train == "scorers" and quantised.stays_packed(model.config):
        check_scorers_apart(source)
    choose_parameters(
        model, start.train, start.lora, shape_base=start.shapes_base, scorers=start.scorers
    )
    request = recipe.model_dump(mode="json")
    inputs = {**inputs_of(where, texts, held_out), **computed(device.type, bf16=bf16)}
    _check_length(model, recipe.sequence_length, reporter)
    sizes = sizes_of(model, settings, texts, source, out, bf16)
    _warn_of_warmup(settings.rates.warmup_steps(sizes.steps), sizes.steps, reporter)
    return Plan(
        request=request,
        inputs=inputs,
        settings=settings,
        sizes=sizes,
        out=out,
        source=source,
        tokenizer=tokenizer,
        texts=texts,
        held_out=held_out,
        device=device,
        bf16=bf16,
        checkpoint=checkpoint_to_resume(request, inputs, part_folder(out)) if resume else None,
    )


def _check_length(model: Any, length: int, reporter: Reporter) -> None:
    """Sequences fit the model's positions, or it is told that they go beyond."""
    rows = learned_positions(model)
    if rows is not None and length > rows:
        raise UsageError(
            f"sequence_length {length:,} is beyond the {rows:,} positions that this "
            f"{model.config.model_type.removeprefix('sparsek_')} has learned",
            hint=f"set sequence_length={rows} or less",
        )
    own = getattr(model.config, "max_position_embeddings", None)
    own = own and context_length(own, getattr(model.config, "rope_parameters", None))
    if own and length > own:
        reporter.say(
            f"sequence_length {length:,} is beyond the {own:,} tokens that the model was made for"
        )


def _warn_of_warmup(warmup: int, steps: int, reporter: Reporter) -> None:
    if warmup < steps:
        return
    what = (
        "the one step has rate 0, and nothing is learnt"
        if steps == 1
        else (f"the rate reaches {(steps - 1) / warmup:.0%} of learning_rate")
    )
    reporter.say(f"the warm-up takes {warmup} steps: {what}; warmup=0 has none")


def _base_name(recipe: "FinetuneRecipe") -> str:
    return os.path.basename(os.path.normpath(recipe.model or recipe.architecture.type))


def _tokenizer(name: str | None, source: hub.Checkpoint | None) -> Any:
    if name in STREAMS:
        return stream_tokenizer(name)
    if name is not None:
        return load_tokenizer(hub.tokenizer_of(name))
    if source is None:
        raise UsageError(
            "init: random needs a tokenizer",
            hint="set 'tokenizer' (a folder, short name or hub id) or 'model'",
        )
    return load_tokenizer(source.path)


def _check_reporters(names: Sequence[str]) -> None:
    packages = {"tensorboard": ("tensorboard", "tensorboardX")}
    for name in names:
        if not any(find_spec(package) for package in packages.get(name, (name,))):
            raise UsageError(
                f"report_to: {name} is not installed", hint=f"`pip install {name}`, or leave it out"
            )
