"""Scorers are fitted anew, in closed form, while the base they score for moves.

The ridge regression of calibration (conversion/calibrate/scorers/linear.py), on what the model
sees in sequences it has just been trained on: a hidden layer stays and is a feature, so that both
kinds of scorers have a closed form. Each KV head takes the map, of those fitted on text, on all and
on what answers look at, that is nearest to the one it had: slopes and shares were chosen for that.
A pure function of weights and step: nothing is kept between two fits, so that runs resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from sparsek_cli.conversion.calibrate.recorded import Recorded
from sparsek_cli.conversion.calibrate.rows import end_of_valued
from sparsek_cli.conversion.calibrate.scorers.linear import LinearFit, Targets
from sparsek_cli.conversion.calibrate.scorers.ridge import LinearMap
from sparsek_cli.conversion.calibrate.scorers.targets import future_attention
from sparsek_cli.data.mixture import Mixture
from sparsek_cli.data.packing import collate
from sparsek_cli.models import sparsek_attentions
from sparsek_cli.models.attention.registration import replaced_attention
from sparsek_cli.models.attention.sharing import layer_of_scores
from sparsek_cli.models.config import ATTENTION, layer_budget
from sparsek_cli.models.logits import Logits
from sparsek_cli.models.scorer import SparseKMlpScorer, SparseKScorer
from sparsek_cli.training.losses.future_attention import (
    asking_rows,
    documents_of,
    looked_at,
)
from sparsek_cli.training.losses.objectives import decoder_of

EVERY = 50
# The newest sequences of the run, at most.
SEQUENCES = 32
_MAPS = ("text", "all", "answers")


class Refit(TrainerCallback):
    """Fits the scorers of a model every `EVERY` steps and after the last one.

    Args:
        model: the causal LM that is trained. data: what it is trained on.
        batch_size: sequences per step. micro_batch_size: sequences of a forward pass.
    """

    def __init__(self, model: Any, data: Mixture, batch_size: int, micro_batch_size: int):
        self._model, self._data = model, data
        self._batch, self._micro = batch_size, micro_batch_size

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step % EVERY == 0 or step == state.max_steps:
            end = step * self._batch
            first = max(0, end - min(SEQUENCES, EVERY * self._batch))
            batches = (
                collate([self._data[i] for i in range(at, min(at + self._micro, end))])
                for at in range(first, end, self._micro)
            )
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                refit(self._model, batches, args.device)


def refit(model: Any, batches: Iterable[dict[str, Any]], device: torch.device) -> None:
    """Gives every scorer of `model` the maps that fit these batches (see packing.collate)."""
    attentions = {a.layer_idx: a for a in sparsek_attentions(model)}
    fits: dict[int, LinearFit] = {}
    was = [module for module in model.modules() if module.training]
    model.eval()
    for batch in batches:
        bounds = batch.get("cu_seq_lens")
        inputs = {
            "input_ids": batch["input_ids"],
            "position_ids": batch.get("position_ids"),
            "cu_seq_lens_q": bounds,
        }
        inputs = {name: x.to(device) for name, x in inputs.items() if x is not None}
        use = partial(_use, fits, documents_of(batch["roles"], bounds), asking_rows(batch["roles"]))
        with torch.no_grad(), _seen(attentions, use):
            decoder_of(model)(**inputs, use_cache=False)
    for module in was:
        module.training = True
    for layer, fit in fits.items():
        scorer = attentions[layer].scorer
        put(scorer, fit.nearest(_map_of(scorer)))


def _use(
    fits: dict[int, LinearFit],
    documents: list[tuple[int, int]],
    asking: torch.Tensor,
    module: Any,
    inputs: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    logits: Logits,
) -> None:
    """Adds what one layer, or one that reads its keys, sees of a batch to the layer's fit.

    Args:
        module: the attention module that has the scorer.
    """
    layer, features = module.layer_idx, _features(module.scorer, inputs)
    if layer not in fits:
        fits[layer] = LinearFit(features.shape[-1], key.shape[1], _MAPS, key.device)
    budget = layer_budget(module.config, layer)
    every = _recordings(query, key, logits, documents, features)
    for (start, end), recorded in zip(documents, every, strict=True):
        _add(fits[layer], recorded, asking[start:end], budget)


@contextmanager
def _seen(attentions: dict[int, Any], use: Callable) -> Iterator[None]:
    """Within the block `use` gets each layer's module, scorer inputs, query, key and `Logits`.

    A layer that reads another's keys comes as that one, with queries of its own.
    """
    inputs: dict[int, torch.Tensor] = {}

    def keeper(layer: int) -> Callable:
        def keep(scorer: Any, args: tuple, kwargs: dict) -> None:
            inputs[layer] = args[0] if args else kwargs["hidden_states"]

        return keep

    def watched(attend: Callable) -> Callable:
        def look(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            if kwargs.get("sparsek_scores") is not None:
                logits = Logits.given(query, kwargs)
                layer = layer_of_scores(module, kwargs)
                with torch.autocast(query.device.type, enabled=False):
                    use(attentions[layer], inputs[layer], query, key, logits)
            return attend(module, query, key, value, mask, **kwargs)

        return look

    handles = [
        attention.scorer.register_forward_pre_hook(keeper(layer), with_kwargs=True)
        for layer, attention in attentions.items()
    ]
    try:
        with replaced_attention(ATTENTION, watched):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _recordings(
    query: torch.Tensor,
    key: torch.Tensor,
    logits: Logits,
    documents: list[tuple[int, int]],
    inputs: torch.Tensor,
) -> Iterator[Recorded]:
    """Each document, of query [B, H, N, D], key [B, G, N, D] and inputs [B, N, C]."""
    length = query.shape[2]
    for start, end in documents:
        row, part = start // length, slice(start % length, start % length + end - start)
        yield Recorded(inputs[row, part], query[row, :, part], key[row, :, part], None, logits)


def _add(fit: LinearFit, recorded: Recorded, asking: torch.Tensor, budget: Any) -> None:
    """The keys of one document, with what its later queries give them."""
    tokens, answers = len(asking), asking.nonzero()[:, 0]
    if len(answers):
        # Keys that every answer could have looked at, as far as there are any.
        last = max(int(answers[0]), tokens // 2) - budget.window
    else:
        last = end_of_valued(tokens, budget.window)
    if last - budget.sinks < 2:
        return
    pairs = torch.arange(budget.sinks, last)
    everywhere, answered = future_attention(recorded, looked_at(asking, 0), asking, budget.window)
    answered = answered[:, pairs] if len(answers) else None
    device = recorded.key.device
    fit.add(recorded, Targets(pairs.to(device), everywhere[:, pairs], answered))


def _features(scorer: SparseKScorer, inputs: torch.Tensor) -> torch.Tensor:
    """[B, N, hidden (+ width)] float32: what scores are a linear map of."""
    inputs = inputs.float()
    if not isinstance(scorer, SparseKMlpScorer):
        return inputs
    hidden = F.gelu(F.linear(inputs, scorer.hidden_weight, scorer.hidden_bias))
    return torch.cat([inputs, hidden], -1)


def _map_of(scorer: SparseKScorer) -> LinearMap:
    weight = scorer.weight.detach().double()
    if isinstance(scorer, SparseKMlpScorer):
        weight = torch.cat([weight, scorer.out_weight.detach().double()], 1)
    return LinearMap(weight, scorer.bias.detach().double())


@torch.no_grad()
def put(scorer: SparseKScorer, found: LinearMap) -> None:
    """Makes a scorer compute `found` of its features."""
    width = scorer.weight.shape[1]
    scorer.weight.copy_(found.weight[:, :width])
    scorer.bias.copy_(found.bias)
    if isinstance(scorer, SparseKMlpScorer):
        scorer.out_weight.copy_(found.weight[:, width:])
