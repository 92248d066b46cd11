"""A long conversation is counted and timed; reading is a process of its own."""

import json
import sys

import numpy as np
import pytest

from experiments import long_reading
from sparsek_cli.data.filler import Filler
from sparsek_cli.data.generated_text import generated_text


def test_a_conversation_reads_nothing_twice(sparse_model, tokenizer, monkeypatch):
    model = sparse_model("llama", topk=8, window=8, sinks=2)
    filler = Filler.from_documents([generated_text(np.random.default_rng(0), 60)], tokenizer)
    document = long_reading._document(filler, 2000, 0)
    row = long_reading._converse(model, tokenizer, document, 10)
    assert row["turns"] == 10 and row["asked"] == 8 and row["fed_again"] == 0
    assert 1300 < row["tokens"] < 2600 and row["fresh"] == row["after"] == 0  # random weights
    ask = long_reading.Conversation.ask

    def forgets(self, question):
        if self.engine.fed > 1300:  # reads the document again
            self.load(document.text)
        return ask(self, question)

    monkeypatch.setattr(long_reading.Conversation, "ask", forgets)
    again = long_reading._converse(model, tokenizer, document, 8)
    assert again["fed_again"] == 8


@pytest.mark.slow
def test_a_toy_run_reads_and_talks(make_sparse, tokenizer, tmp_path, monkeypatch):
    make_sparse("llama", topk=8, window=8, sinks=2).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--smoke"]
    monkeypatch.setattr(sys, "argv", ["long_reading", *words, "--document", "0"])
    long_reading.main()
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert all("error" not in phase for phase in record["phases"].values())
    lengths = [row["tokens"] for row in record["rows"] if "peak_mib" in row]
    assert len(lengths) == 2 and lengths[0] < lengths[1]
    assert set(record["reading"]) == {"memory", "ms_per_token"}
