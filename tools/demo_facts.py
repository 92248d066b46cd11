"""How many of the facts in a long document a model finds, read under several policies.

python tools/demo_facts.py MODEL [MODEL ...] --documents 64     # the rate behind `make demo`
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

import numpy as np
import torch

from sparsek_cli.data.needles import (
    Filler,
    NeedleDocument,
    chat_messages,
    is_correct,
    make_document,
)
from sparsek_cli.data.phrasings import phrasings
from sparsek_cli.evaluation.policies.registry import make_policy

FACTS = 8
POLICIES = ("sparsek", "dense", "window")
_LONGEST_ANSWER = 24  # tokens


def document_of(filler: Filler, tokens: int, seed: int) -> NeedleDocument:
    """A document of about `tokens` tokens with `FACTS` facts, one in each eighth of it.

    They are told in phrasings that neither `tiny` nor its calibration has seen.
    """
    rng = np.random.default_rng(seed)
    depths = (np.arange(FACTS) + rng.random(FACTS)) / FACTS
    return make_document(
        rng, filler, tokens=tokens, needles=FACTS, phrasings=phrasings("held_out"), depths=depths
    )


def answers(model: Any, tokenizer: Any, document: NeedleDocument, policy: str) -> list[str]:
    """The model's answer to each fact's question, greedily; the document is read once."""
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(
                chat_messages(document.text, fact.question),
                tokenize=False,
                add_generation_prompt=True,
            ),
            add_special_tokens=False,
        ).input_ids
        for fact in document.facts
    ]
    shared = len(commonprefix(prompts))
    rule = make_policy(policy)
    with torch.inference_mode(), rule.applied(model):
        cache = rule.new_cache(model)
        _read(model, prompts[0][:shared], cache)
        return [
            _answer(model, tokenizer, prompt[shared:], copy.deepcopy(cache)) for prompt in prompts
        ]


def found(document: NeedleDocument, replies: Sequence[str]) -> list[bool]:
    """Whether each reply holds the value that was asked for."""
    pairs = zip(document.facts, replies, strict=True)
    return [is_correct(reply, fact.expected) for fact, reply in pairs]


def _read(model: Any, ids: Sequence[int], cache: Any) -> int:
    """Reads ids [N] into the cache; returns the likeliest next id."""
    batch = torch.tensor([ids], device=model.device)
    output = model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return int(output.logits[0, -1].argmax())


def _answer(model: Any, tokenizer: Any, question: Sequence[int], cache: Any) -> str:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    said: list[int] = []
    word = _read(model, question, cache)
    while word not in ends and len(said) < _LONGEST_ANSWER:
        said.append(word)
        word = _read(model, [word], cache)
    return tokenizer.decode(said, skip_special_tokens=True).strip()


def main() -> None:
    """Counts over many documents and prints one JSON line for each model and policy."""
    import sparsek_cli as sparsek
    from demo import LENGTH, measured_text

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the first document")
    given = parser.parse_args()
    for name in given.models:
        model, tokenizer = sparsek.load(name)
        filler = Filler.from_documents([measured_text()], tokenizer)
        counts = dict.fromkeys(POLICIES, 0)
        for number in range(given.documents):
            document = document_of(filler, LENGTH - 128, given.seed + number)
            for policy in POLICIES:
                counts[policy] += sum(found(document, answers(model, tokenizer, document, policy)))
            asked = FACTS * (number + 1)
            print(json.dumps({"model": name, "asked": asked, "found": counts}), flush=True)


if __name__ == "__main__":
    main()
