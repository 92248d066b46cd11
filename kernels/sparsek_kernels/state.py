"""What a decoder keeps per layer: a fixed number of key-value slots for every row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EMPTY = -1  # the position of a slot that holds nothing


def topk_per_head(topk: int | Sequence[int], heads: int) -> tuple[int, ...]:
    """One k per KV head; raises ValueError or TypeError where `topk` is neither."""
    values = (topk,) * heads if isinstance(topk, int) else tuple(topk)
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise TypeError(f"topk must be an integer or integers, got {topk!r}")
    if len(values) != heads:
        raise ValueError(f"topk names {len(values)} heads, the keys have {heads}")
    if min(values) < 0:
        raise ValueError(f"topk must not be negative, got {topk!r}")
    return values


@dataclasses.dataclass(frozen=True)
class SlotLayout:
    """Where each head's slots lie: [sinks | selected | window] per head, heads one after another.

    The padded form gives every head the largest k: [G, s + max k + w].
    """

    topk: tuple[int, ...]
    window: int
    sinks: int

    @property
    def heads(self) -> int:
        return len(self.topk)

    @property
    def width(self) -> int:
        """Slots of the widest head."""
        return self.sinks + max(self.topk) + self.window

    @property
    def total(self) -> int:
        """Slots of all heads together."""
        return sum(self.topk) + self.heads * (self.sinks + self.window)

    @property
    def uniform(self) -> bool:
        return min(self.topk) == max(self.topk)

    def real(self, device: torch.device) -> Tensor:
        """[G, max k] bool: selected slots that the head really has."""
        return _index(self, device)[2]

    def expand(self, device: torch.device) -> Tensor:
        """[G, width] int64: padded slot -> slot; absent ones repeat one of the window."""
        return _index(self, device)[0]

    def flatten(self, device: torch.device) -> Tensor:
        """[total] int64: slot -> index in the flattened padded form."""
        return _index(self, device)[1]


@functools.lru_cache(maxsize=64)
def _index(layout: SlotLayout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    expand = torch.zeros(layout.heads, layout.width, dtype=torch.int64)
    real = torch.zeros(layout.heads, layout.width, dtype=torch.bool)
    widest, start = max(layout.topk), 0
    for head, k in enumerate(layout.topk):
        held = layout.sinks + k
        window = slice(layout.sinks + widest, layout.width)
        expand[head, :held] = start + torch.arange(held)
        expand[head, held:] = start + held
        expand[head, window] = start + held + torch.arange(layout.window)
        real[head, :held] = True
        real[head, window] = True
        start += held + layout.window
    flatten = real.flatten().nonzero()[:, 0]
    selected = real[:, layout.sinks : layout.sinks + widest].contiguous()
    return expand.to(device), flatten.to(device), selected.to(device)


def cache_bytes(
    batch: int,
    topk: int | Sequence[int],
    window: int,
    sinks: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Bytes of one layer's SparseKState, whatever the context (section 2: s + k + w slots).

    Per slot: key and value (int8: and a float32 scale of each), the position (int32) and the
    effective score (float64); per row the number of tokens seen (int64).
    """
    layout = SlotLayout(topk_per_head(topk, heads), window, sinks)
    slot = 2 * head_dim * dtype.itemsize + torch.int32.itemsize + torch.float64.itemsize
    if dtype == torch.int8:
        slot += 2 * torch.float32.itemsize
    return batch * (layout.total * slot + torch.int64.itemsize)


@dataclasses.dataclass
class SparseKState:
    """Slots of one layer; S = sum over heads of s + k_g + w, allocated whole from the start.

    Attributes:
        layout: how the S slots divide among heads.
        keys, values: [B, S, D], in the dtype of the call, or int8 with `key_scale` and
            `value_scale` [B, S] float32 (see quantization.py).
        positions: [B, S] int32, EMPTY (-1) where a slot is free. A sink's token stands only in
            its sink slot; token p of the window stands in ring slot p mod w.
        scores: [B, S] float64 effective scores.
        seen: [B] int64, tokens seen by each row (rows may differ).
        support, tau: only under gates `log` and `kv`, else None: [B, G, W] float64 scores (no
            keys) of the candidates above tau, -inf where none, and tau [B, G]. W follows the
            scores' spread and is not part of `cache_bytes`.
    """

    layout: SlotLayout
    keys: Tensor
    values: Tensor
    positions: Tensor
    scores: Tensor
    seen: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    support: Tensor | None = None
    tau: Tensor | None = None
    _arrivals: list[Tensor] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @classmethod
    def empty(
        cls,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        topk: int | Sequence[int],
        window: int,
        sinks: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        filled: bool = True,
    ) -> SparseKState:
        """A state that has seen nothing, for `heads` KV heads; int8 is the 8-bit cache.

        Not `filled` it is memory as it was found: for a call that is told that it is `fresh`, which
        fills it, and for nobody else.
        """
        if window < 1 or sinks < 0:
            raise ValueError(f"window must be >= 1 and sinks >= 0, got {window} and {sinks}")
        layout = SlotLayout(topk_per_head(topk, heads), window, sinks)
        slots = (batch, layout.total)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        scales = [None, None]
        if dtype == torch.int8:
            scales = [new(*slots, dtype=torch.float32) for _ in range(2)]
        made = cls(
            layout=layout,
            keys=new(*slots, head_dim, dtype=dtype),
            values=new(*slots, head_dim, dtype=dtype),
            positions=new(*slots, dtype=torch.int32),
            scores=new(*slots, dtype=torch.float64),
            seen=new(batch, dtype=torch.int64),
            key_scale=scales[0],
            value_scale=scales[1],
        )
        if filled:
            made.forget()
        return made

    def forget(self) -> None:
        """As if it had seen nothing, in place."""
        for name, tensor in self.slots.items():
            tensor.fill_(EMPTY) if name == "positions" else tensor.zero_()
        self.support = self.tau = None

    def _tensors(self) -> dict[str, Tensor]:
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if torch.is_tensor(value)}

    @property
    def slots(self) -> dict[str, Tensor]:
        """The tensors of fixed shape by name: all but the soft support of gates log and kv."""
        return {n: t for n, t in self._tensors().items() if n not in ("support", "tau")}

    @property
    def quantized(self) -> bool:
        """Whether keys and values are 8-bit codes."""
        return self.key_scale is not None

    def _map(self, change) -> SparseKState:
        return dataclasses.replace(self, **{n: change(t) for n, t in self._tensors().items()})

    @property
    def batch(self) -> int:
        return self.seen.shape[0]

    def arrivals(self) -> Tensor | None:
        """int32 [B, G + 1], zeros: where the programs of a step over all rows are counted.

        Every launch leaves zeros behind, and steps of one state never overlap. None where they
        would be made while a CUDA graph is captured, which writes them only when it is replayed.
        """
        device = self.seen.device
        if not self._arrivals:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            size = self.batch, self.layout.heads + 1
            self._arrivals.append(torch.zeros(size, dtype=torch.int32, device=device))
        return self._arrivals[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; equals `cache_bytes` (plus the soft support of log and kv)."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    @property
    def pair_nbytes(self) -> int:
        """Bytes of keys and values alone, the scales of codes included."""
        pairs = (self.keys, self.values, self.key_scale, self.value_scale)
        return sum(t.numel() * t.element_size() for t in pairs if t is not None)

    def index_select(self, rows: Tensor) -> SparseKState:
        """The given rows [B'] int64, repeats allowed (beam reorder); a copy."""
        return self._map(lambda t: t.index_select(0, rows.to(t.device)))

    def to(self, device: torch.device | str) -> SparseKState:
        return self._map(lambda t: t.to(device))

    def clone(self) -> SparseKState:
        return self._map(torch.clone)

    def copy_(self, other: SparseKState) -> None:
        """Takes over the slots of a state of the same layout and batch, in place.

        Without the soft support of gates log and kv, whose size is not fixed.
        """
        for name, tensor in self.slots.items():
            tensor.copy_(getattr(other, name))
        self.support = self.tau = None

    def put_row(self, row: int, other: SparseKState) -> None:
        """Row `row` becomes the only row of a state of the same layout, in place; see `copy_`."""
        for name, tensor in self.slots.items():
            tensor[row].copy_(getattr(other, name)[0])

    @classmethod
    def cat(cls, states: Sequence[SparseKState]) -> SparseKState:
        """Rows of several states of one layout, in order; a copy."""
        fields: dict[str, Tensor] = {}
        for name in states[0]._tensors():
            parts = [getattr(state, name) for state in states]
            if name == "support":
                width = max(part.shape[2] for part in parts)
                parts = [
                    torch.nn.functional.pad(p, (width - p.shape[2], 0), value=-torch.inf)
                    for p in parts
                ]
            fields[name] = torch.cat(parts)
        return dataclasses.replace(states[0], **fields)


@dataclasses.dataclass
class StateRows:
    """Some rows of a larger pool of states, which calls update in place.

    A server keeps every request's state in a pool it manages itself, and gives a call the rows of
    the requests at hand. The pool's tensors may be views of a wider block: only the last
    dimensions of each must be contiguous, any stride from row to row will do.

    Attributes:
        pool: the states, one row for each that fits.
        rows: [B] int64 or int32, the rows of this call, each once (rows that nobody reads may
            repeat).
        fresh: [B] bool, rows that have seen nothing, whatever stands in them; None: there is none.
    """

    pool: SparseKState
    rows: Tensor
    fresh: Tensor | None = None

    @property
    def layout(self) -> SlotLayout:
        return self.pool.layout

    @property
    def batch(self) -> int:
        return self.rows.shape[0]

    @property
    def keys(self) -> Tensor:
        """[rows of the pool, S, D], as the pool has them."""
        return self.pool.keys

    @property
    def quantized(self) -> bool:
        return self.pool.quantized

    @property
    def seen(self) -> Tensor:
        """[B] int64; a copy."""
        seen = self.pool.seen.index_select(0, self.rows)
        return seen if self.fresh is None else seen.masked_fill_(self.fresh, 0)

    def take(self) -> SparseKState:
        """The rows as a state of their own; a copy."""
        state = self.pool.index_select(self.rows)
        if self.fresh is not None:
            for name, held in state.slots.items():
                # Even a weight of 0 would hand on an infinity that an earlier owner left.
                fresh = self.fresh.view(-1, *[1] * (held.dim() - 1))
                held.masked_fill_(fresh, EMPTY if name == "positions" else 0)
        return state

    def through(
        self, call: Callable[[SparseKState], tuple[Tensor, SparseKState]]
    ) -> tuple[Tensor, StateRows]:
        """What a call makes of a copy of the rows, which then are what it made of their states."""
        out, state = call(self.take())
        self.put(state)
        return out, self

    def put(self, state: SparseKState) -> None:
        """Takes over a state of as many rows, in place."""
        for name, tensor in self.pool.slots.items():
            tensor.index_copy_(0, self.rows.long(), getattr(state, name))
