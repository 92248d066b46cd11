"""What lies in a model's folder and is nobody's to read is no reason to refuse the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from bad_models import file, special
from transformers import AutoTokenizer
from verbs import convert

from sparsek_cli import hub
from sparsek_cli.recipes.schema_convert import ConvertRecipe


def gone(path: Path) -> None:
    path.symlink_to("me@host.1234:5678")


UNREAD = {
    "lock": special(".#config.json", gone),  # Emacs, of config.json that is being edited
    "lock-weights": special(".#model.safetensors", gone),
    "lock-template": special(".#chat_template.jinja", gone),
    "lock-named-template": special("additional_chat_templates/.#tools.jinja", gone),
    "results": special("latest.json", gone),
    "folder": special("runs.json", Path.mkdir),
    "recipes": special("mine.yaml", Path.mkdir),
    "pipe": special("progress.json", os.mkfifo),
    "template-of-others": file("chat_template.json", "[" * 200_000),
    "template": file("draft.jinja", b"\xff\xfe{"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, make_checkpoint) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("foreign") / "good")


@pytest.mark.parametrize("kind", UNREAD)
def test_what_nothing_reads_may_be_anything(good, tmp_path, kind, caplog):
    UNREAD[kind](good, tmp_path / "m")
    assert hub.resolve(tmp_path / "m").path == tmp_path / "m"
    assert not caplog.records
    out = tmp_path / "out"
    recipe = {"model": str(tmp_path / "m"), "out": str(out), "calibrate": "none"}
    convert(ConvertRecipe(**recipe, topk=6, window=4))
    mine, its = (AutoTokenizer.from_pretrained(folder) for folder in (out, good))
    assert mine.get_vocab() == its.get_vocab()
    assert json.loads((out / "config.json").read_text())["sparsek"]["window"] == 4
