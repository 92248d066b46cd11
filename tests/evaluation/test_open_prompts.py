"""Tokenizers that close every text (`add_eos_token`): what goes on is left open."""

import json
import shutil

import pytest
from tokenizers import processors

from sparsek_cli.errors import SparsekError
from sparsek_cli.evaluation.measured_model import measured_model
from sparsek_cli.evaluation.settings import loading_of, prompts_of
from sparsek_cli.hub import Checkpoint
from sparsek_cli.loading import load_open_tokenizer, load_tokenizer

END = ("</s>", 2)


def closing(source, folder, processor):
    """The checkpoint with a tokenizer whose post-processor this is."""
    shutil.copytree(source, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(folder)("ab").input_ids[-1] == END[1]
    return folder


@pytest.fixture(params=["<s> $A </s>", "$A </s>", "sequence"])
def closed(request, checkpoints, tmp_path):
    single = "<s> $A </s>" if request.param == "sequence" else request.param
    template = processors.TemplateProcessing(single, special_tokens=[("<s>", 1), END])
    if request.param == "sequence":
        template = processors.Sequence([processors.ByteLevel(), template])
    return closing(checkpoints[1], tmp_path / "closed", template)


def test_prompts_choices_and_passages_are_left_open(closed, checkpoints, recipe, tmp_path):
    from sparsek_cli.evaluation.tasks import ppl

    wanted = recipe()
    place = Checkpoint(closed, closed.name, "folder")
    said = []
    lm = measured_model(
        place, loading_of(wanted), prompts_of(wanted), sparse=False, say=said.append
    ).lm  # fmt: skip
    bare = lm.tokenizer("some words", add_special_tokens=False).input_ids
    assert lm.tok_encode("some words")[-len(bare) :] == bare
    assert (
        lm._encode_pair("some words", " A")[1]
        == lm.tokenizer(" A", add_special_tokens=False).input_ids
    )
    text = " ".join(f"word {n}" for n in range(900))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    rows = ppl.dataset(
        tokenizer=str(closed), max_seq_lengths=[512], limit=1, text=[str(tmp_path / "one.txt")],
        sparsek={"documents": 1},
    )["test"]  # fmt: skip
    assert 496 <= rows["tokens"][0] <= 512


def test_what_cannot_be_left_open_is_named(checkpoints, tmp_path):
    processor = processors.BertProcessing(END, ("<s>", 1))
    folder = closing(checkpoints[1], tmp_path / "bert", processor)
    with pytest.raises(SparsekError, match="puts .'</s>'. behind every text") as caught:
        load_open_tokenizer(folder)
    assert "add_eos_token" in caught.value.hint


def test_the_tokenizer_itself_stays_as_it_is(closed):
    before = json.loads((closed / "tokenizer.json").read_text())
    load_open_tokenizer(closed)
    assert json.loads((closed / "tokenizer.json").read_text()) == before
    assert load_tokenizer(closed)("ab").input_ids[-1] == END[1]
