"""Greedy search and sampling over a SparseK cache: what `generate` does once the prompt is read.

transformers' own loop launches some forty small operations per token beside the model and waits for
the device each time. Here the usual choices (greedy; temperature, top-k, top-p, min-p; end tokens)
are part of the decoding step's graph, the device is never waited for where nobody needs the token,
and everything else (other processors and criteria, streamers, scores) is called as there.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparsek_cli.models.cache.slots import SparseKCache
from sparsek_cli.models.generation.compiled import compile_options
from sparsek_cli.models.generation.kept_decoders import decoder_for
from sparsek_cli.models.generation.likeliest import Ending, likeliest
from sparsek_cli.models.learned_positions import Room

# They look at the logits alone and only launch work, so that they can be part of a graph.
_GRAPH_PROCESSORS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
# What `generate` hands on to every forward, and this loop deals with itself.
_KNOWN = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "inputs_embeds",
}  # fmt: skip


class Choice:
    """The next token of every row from its logits; rows that have ended get padding.

    Args:
        processors: applied to the logits, float32. sample: draw, or take the likeliest.
        ends: end tokens [E] int64, or None. pad: what follows an end, a 0-d tensor or None.
        batch: number of rows B.

    Attributes:
        running: [B] int64, 1 where the row has not ended; changed in place.
        in_graph: whether a call only launches work and looks at nothing but the logits.
        signature: equal for choices that do the same.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        *,
        sample: bool,
        ends: torch.Tensor | None,
        pad: torch.Tensor | None,
        batch: int,
        device: torch.device,
    ):
        self.processors, self.sample = processors, sample
        self.running = torch.ones(batch, dtype=torch.int64, device=device)
        self._ending = None
        if ends is not None:
            self._ending = Ending(
                self.running, ends.to(device, torch.int64), pad.to(device, torch.int64)
            )
        self.in_graph = all(type(one) in _GRAPH_PROCESSORS for one in processors)
        self._nothing = torch.empty(batch, 0, dtype=torch.int64, device=device)
        self.signature = (
            tuple((type(one), repr(vars(one))) for one in processors),
            sample,
            None if ends is None else tuple(ends.tolist()),
            None if pad is None else int(pad),
        )

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [B] of logits [B, V], of any floating dtype."""
        if self.sample or len(self.processors):
            logits = self.processors(self._nothing, logits.float())
        return self.of(logits)

    def of(self, scores: torch.Tensor) -> torch.Tensor:
        """Tokens [B] of processed scores [B, V]."""
        if not self.sample:
            return likeliest(scores, self._ending)
        # torch.multinomial's own draw, without its look at the sums, which waits.
        weights = nn.functional.softmax(scores, dim=-1)
        words = (weights / torch.empty_like(weights).exponential_(1)).argmax(dim=-1)
        return words if self._ending is None else self._ending.follow(words)


class _Ended:
    """Whether all rows have ended: known at once, or one step late and without waiting."""

    def __init__(self, device: torch.device, late: bool):
        self._late = late and device.type == "cuda"
        if self._late:
            self._flags = [torch.zeros(1, dtype=torch.int64, pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in range(2)]
        self._count = 0

    def __call__(self, running: torch.Tensor) -> int | None:
        """None while rows run; else how many steps ago they had ended: 0, or 1 if told late."""
        if not self._late:
            return None if bool(running.any()) else 0
        now = self._count % 2
        self._flags[now].copy_(running.max()[None], non_blocking=True)
        self._events[now].record()
        self._count += 1
        if self._count == 1:
            return None
        self._events[1 - now].synchronize()
        return None if self._flags[1 - now][0] else 1


def can_write(config: Any, kwargs: dict[str, Any], *, synced_gpus: bool) -> bool:
    """Whether `write` does what transformers' loop would: no inner states are asked for, and the
    model's forward gets nothing beside its tokens."""
    cache, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    others = (value for name, value in kwargs.items() if name not in _KNOWN)
    return (
        isinstance(cache, SparseKCache)
        and cache.all_slots
        and bool(kwargs.get("use_cache"))
        and not (synced_gpus or config.output_attentions or config.output_hidden_states)
        and (positions is None or positions.ndim == 2)
        and all(value is None for value in others)
    )


@torch.no_grad()
def write(
    model: Any,
    input_ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: Any,
    streamer: Any,
    kwargs: dict[str, Any],
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """As transformers' `_sample`, with the same arguments and result.

    Raises:
        SparsekError: a token would stand beyond the model's learned positions.
    """
    cache: SparseKCache = kwargs["past_key_values"]
    output = model._prefill(input_ids, config, kwargs, is_first_iteration=True)
    logits = output.logits[:, -1].to(copy=True, dtype=torch.float32, device=input_ids.device)
    del output
    recorder = _Recorder(config)
    kept = recorder.active or getattr(cache, "given", True)
    rows, start = input_ids.shape
    ends = [one.eos_token_id for one in criteria if isinstance(one, EosTokenCriteria)]
    usual = all(type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in criteria)
    usual = usual and len(ends) <= 1 and criteria.max_length is not None
    choice = Choice(
        processors,
        sample=config.do_sample,
        ends=ends[0] if ends else None,
        pad=config._pad_token_tensor if ends else None,
        batch=rows,
        device=logits.device,
    )
    in_graph = usual and choice.in_graph and not recorder.active
    ended = _Ended(logits.device, late=not kept and streamer is None)
    positions = kwargs.get("position_ids")
    positions = cache.layers[0].state.seen if positions is None else positions[:, -1] + 1
    text, room = _Text(input_ids, criteria.max_length), Room(model, positions)
    optimized = getattr(model, "_optimize_model_for_decode", nullcontext)
    with (
        optimized(),
        decoder_for(
            model, rows, pick=choice if in_graph else None, compiled=compile_options(config)
        ) as decoder,
        decoder.over(cache, positions, keep=kept),
    ):
        if in_graph:
            choice = decoder.pick
            choice.running.fill_(1)
            words = choice(logits)
        while True:
            if not in_graph:
                scores = processors(text.ids, logits)
                recorder.add(scores, logits)
                words = choice.of(scores)
            text.append(words)
            if streamer is not None:
                streamer.put(words.cpu())
            if not usual:
                choice.running.mul_(~criteria(text.ids, recorder.scores))
            # Without an end token nobody can stop before the length does.
            late = ended(choice.running) if ends or not usual else None
            if late is not None:
                text.drop(late)
                recorder.drop(late)
                break
            if criteria.max_length is not None and text.length >= criteria.max_length:
                break
            if words is not decoder.words:
                decoder.words.copy_(words)
            room.take()
            decoder.step()
            words = decoder.words
            if not in_graph:
                logits = decoder.logits
    if streamer is not None:
        streamer.end()
    return recorder.result(text.ids, cache) if config.return_dict_in_generate else text.ids


class _Text:
    """Token ids [B, length] that grow in a buffer, by doubling where the end is not known."""

    def __init__(self, input_ids: torch.Tensor, longest: int | None):
        rows, self.length = input_ids.shape
        size = max(longest or 0, self.length + 1)
        self._buffer = input_ids.new_empty(rows, size)
        self._buffer[:, : self.length] = input_ids

    @property
    def ids(self) -> torch.Tensor:
        return self._buffer[:, : self.length]

    def append(self, words: torch.Tensor) -> None:
        if self.length == self._buffer.shape[1]:
            self._buffer = torch.cat([self._buffer, torch.empty_like(self._buffer)], dim=1)
        self._buffer[:, self.length] = words
        self.length += 1

    def drop(self, count: int) -> None:
        self.length -= count


class _Recorder:
    """Scores and logits of every token, where `generate` was asked for them."""

    def __init__(self, config: Any):
        self.active = bool(config.return_dict_in_generate)
        self.scores = () if self.active and config.output_scores else None
        self.logits = () if self.active and config.output_logits else None

    def add(self, scores: torch.Tensor, logits: torch.Tensor) -> None:
        # Copies: the next step writes into the logits, and greedy scores may be these.
        if self.scores is not None:
            self.scores += (scores.clone(),)
        if self.logits is not None:
            self.logits += (logits.clone(),)

    def drop(self, count: int) -> None:
        for name in ("scores", "logits"):
            if count and getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:-count])

    def result(self, ids: torch.Tensor, cache: SparseKCache) -> GenerateDecoderOnlyOutput:
        return GenerateDecoderOnlyOutput(
            sequences=ids, scores=self.scores, logits=self.logits, past_key_values=cache
        )
