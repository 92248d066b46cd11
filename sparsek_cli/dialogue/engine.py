"""A model, its cache and a loop: tokens are fed once, replies stream out one token at a time."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsek_cli.converted import is_converted
from sparsek_cli.dialogue.check_saved import check_conversation
from sparsek_cli.dialogue.drawing.own_settings import shaped
from sparsek_cli.dialogue.drawing.sampling import Sampling, draw
from sparsek_cli.dialogue.heard import Heard
from sparsek_cli.dialogue.interrupt import interruptible
from sparsek_cli.errors import SparsekError, UsageError
from sparsek_cli.families.positions import context_length, learned_positions
from sparsek_cli.loading.reads_on import check_reads_on

if TYPE_CHECKING:
    import torch
    from transformers import Cache, PreTrainedModel

    from sparsek_cli.models.generation.cuda_graphs import Decoder

CHUNK = 1024  # tokens per forward while reading: bounds activations, not what is remembered


@dataclass
class Snapshot:
    """What an engine has read: its cache (a copy) and everything beside it."""

    cache: "Cache"
    fed: int
    unfed: list[int]
    heard: Heard
    logits: "torch.Tensor | None"


class Engine:
    """Feeds tokens to a model and draws replies; the cache holds exactly what was fed.

    Args:
        chunk: tokens read at once. dense: for use inside `dense_attention(model)`.

    Raises:
        UsageError: a dense model that cannot be read in pieces, see `check_reads_on`.

    Attributes:
        fed: number of tokens the model has seen in this conversation.
        heard: these tokens.
        sparse: whether the checkpoint is converted; a dense one works too, with a growing cache.
        interrupted: whether the last `feed` or `stream` was stopped by Ctrl-C.
        at_limit: whether the last `stream` ended because it was as long as it may be.
    """

    def __init__(self, model: "PreTrainedModel", *, chunk: int = CHUNK, dense: bool = False):
        check_reads_on(model)
        self.model = model
        self.chunk = chunk
        self.sparse = is_converted(model.config) and not dense
        self.interrupted = self.at_limit = False
        self._proven = not self.sparse
        self._table = learned_positions(model)
        self._decoder: Decoder | None = None
        self._stepping: ExitStack | None = None  # open while the decoder writes into the cache
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation."""
        self._settle()
        self.at_limit = False
        self.cache = self._new_cache()
        self.fed = 0
        self.heard = Heard()
        self._logits: torch.Tensor | None = None
        self._unfed: list[int] = []  # drawn and shown, but not yet read by the model

    def _new_cache(self) -> "Cache":
        if self.sparse:
            from sparsek_cli.models import SparseKCache

            return SparseKCache(self.model.config)
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def feed(
        self, tokens: Sequence[int], *, on_tokens: Callable[[int], None] | None = None
    ) -> bool:
        """Reads tokens in chunks; a Ctrl-C stops between two chunks.

        Args:
            on_tokens: called with the number of tokens read after each chunk.

        Returns:
            Whether everything was read.
        """
        queue = [*self._unfed, *tokens]
        self._check_room(len(queue))
        self._unfed = []
        self._settle()
        self.interrupted = False
        with interruptible() as stop, self._first_proven():
            for start in range(0, len(queue), self.chunk):
                piece = queue[start : start + self.chunk]
                self._read(piece)
                if on_tokens is not None:
                    on_tokens(len(piece))
                if stop.is_set() and start + self.chunk < len(queue):
                    self.interrupted = True
                    return False
        return True

    def _read(self, piece: list[int]) -> None:
        import torch

        device = self.model.device
        positions = torch.arange(self.fed, self.fed + len(piece), device=device)
        with torch.no_grad():
            output = self.model(
                input_ids=torch.tensor([piece], device=device),
                position_ids=positions.unsqueeze(0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._logits = output.logits[0, -1].float()
        self.fed += len(piece)
        self.heard.extend(piece)

    def _first_proven(self) -> AbstractContextManager[None]:
        """Around what a converted model reads first: SparseK attention must have run."""
        if self._proven:
            return nullcontext()
        from sparsek_cli.models import proven

        self._proven = True
        return proven(self.model, "chat")

    def stream(self, sampling: Sampling, stop_tokens: frozenset[int]) -> Iterator[int]:
        """Draws the reply. Ends at a stop token (not yielded, not fed), at the limit, or at Ctrl-C.

        Raises:
            SparsekError: nothing was fed yet, or the logits are not numbers.
            UsageError: see `shaped`.
        """
        import torch

        if self._logits is None and not self._unfed:
            raise SparsekError("nothing to answer", hint="write something first")
        self.interrupted = self.at_limit = False
        generator = torch.Generator(device="cpu").manual_seed(sampling.seed + self.fed)
        shape = shaped(self.model, sampling, stop_tokens, self.said)
        try:
            with interruptible() as stop:
                for _ in range(sampling.max_new_tokens):
                    if self._unfed:
                        self._step()
                    if stop.is_set():
                        self.interrupted = True
                        return
                    if shape is None:
                        token = draw(self._logits, sampling, generator)
                    else:
                        token = draw(shape(self._logits), shape.sampling, generator)
                        shape.follow(token)
                    if token in stop_tokens:
                        return
                    self._unfed = [token]
                    yield token
                self.at_limit = True
        finally:
            self._settle()

    def _step(self) -> None:
        """Reads the token that was drawn, by a CUDA graph where there can be one."""
        import torch

        if not (self.sparse and self.cache.all_slots) or len(self._unfed) != 1 or not self.fed:
            self.feed([])
            return
        from sparsek_cli.models.generation.kept_decoders import decoder_for

        self._check_room(1)
        if self._stepping is None:
            self._stepping = ExitStack()
            self._decoder = self._stepping.enter_context(decoder_for(self.model, 1))
            place = torch.tensor([self.fed], device=self.model.device)
            self._stepping.enter_context(self._decoder.over(self.cache, place))
        word = torch.tensor(self._unfed, device=self.model.device)
        self._logits = self._decoder.read(word)[0]
        self.heard.extend(self._unfed)
        self._unfed = []
        self.fed += 1

    def snapshot(self) -> Snapshot:
        """Where the engine stands, copied."""
        self._settle()
        logits = None if self._logits is None else self._logits.clone()
        cache = copy.deepcopy(self.cache)
        return Snapshot(cache, self.fed, list(self._unfed), self.heard.copy(), logits)

    def restore(self, snapshot: Snapshot) -> None:
        """Goes back to a snapshot, which stays usable."""
        self._settle()
        self.cache = copy.deepcopy(snapshot.cache)
        self.fed, self._unfed = snapshot.fed, list(snapshot.unfed)
        self.heard, self._logits = snapshot.heard.copy(), snapshot.logits

    def save(self, path: str, notes: dict[str, Any]) -> None:
        """Writes what was read, and `notes`, as a state file (see models/cache/state_file.py).

        Raises:
            UsageError: the model is not converted. SparsekError: nothing was read, or no room.
        """
        from sparsek_cli.models import save_state

        self._check_sparse("a state")
        self._settle()
        engine = {"fed": self.fed, "unfed": self._unfed, "heard": self.heard.tolist()}
        save_state(self.cache, path, self.model, notes={"engine": engine, **notes})

    def load(self, path: str) -> dict[str, Any]:
        """Goes on where a state file ends; returns its notes.

        Raises:
            UsageError: the file is no state of this model, or damaged; nothing has changed.
        """
        from sparsek_cli.models import load_state

        self._check_sparse("a state")
        cache, notes = load_state(path, self.model)
        check_conversation(notes, path, cache, self.model.get_input_embeddings().weight.shape[0])
        self._settle()
        self.cache, self._logits = cache, None
        engine = notes.pop("engine")
        self.fed, self._unfed = engine["fed"], engine["unfed"]
        self.heard = Heard(engine["heard"])
        return notes

    def budget(self) -> str:
        """The budget in words."""
        self._check_sparse("a budget")
        block = self.model.config.sparsek
        topk = block["topk"]
        kept = f"{topk} selected" if isinstance(topk, int) else "selected pairs that differ by head"
        return f"{block['sinks']} sinks, {kept}, a window of {block['window']}"

    def set_budget(self, pairs: int) -> None:
        """Keeps `pairs` per KV head from now on, sinks and window included.

        Raises:
            UsageError: not a converted model, or no more than sinks and window.
        """
        from sparsek_cli.models import set_budget

        self._check_sparse("a budget")
        block = self.model.config.sparsek
        least = block["sinks"] + block["window"]
        if pairs < least:
            raise UsageError(
                f"{pairs} pairs are fewer than sinks and window have ({least})",
                hint=f"at least {least}",
            )
        set_budget(self.model, topk=pairs - least)

    def _check_sparse(self, what: str) -> None:
        if not self.sparse:
            raise UsageError(
                f"{what} needs a converted model", hint="convert it first: sparsek convert"
            )

    def _settle(self) -> None:
        """Gives the cache back to whoever reads more than one token, or copies it."""
        if self._stepping is not None:
            stack, self._stepping = self._stepping, None
            stack.close()

    @property
    def tokens(self) -> int:
        """How many tokens the conversation has: those fed, and the last one drawn."""
        return self.fed + len(self._unfed)

    def said(self) -> list[int]:
        """The tokens of the conversation."""
        return self.heard.tolist() + self._unfed

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values (and of the selection's bookkeeping) held now."""
        if self.sparse:
            return self.cache.nbytes
        from sparsek_cli.models.cache.bytes import pair_bytes, state_bytes

        return sum(pair_bytes(layer) + state_bytes(layer) for layer in self.cache.layers)

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes a dense cache would hold for the tokens fed so far."""
        if not self.sparse:  # whatever its family stores, which no config of another one says
            return self.kv_bytes
        from sparsek_cli.models import dense_cache_bytes

        return dense_cache_bytes(self.model.config, self.fed, self.model.dtype, 1)

    @property
    def context_limit(self) -> int | None:
        """Longest context the positions of this model were made for, None if unknown."""
        config = self.model.config
        own = getattr(config, "max_position_embeddings", None)
        return own and context_length(own, getattr(config, "rope_parameters", None))

    def _check_room(self, tokens: int) -> None:
        limit = self._table
        if limit is not None and self.fed + tokens > limit:
            raise SparsekError(
                f"the context is full: this model has learned positions for {limit} tokens only",
                hint="start again with /clear, load less, or use a model with rotary positions",
            )
