"""The attention layer that stands where a family's block of vLLM has its `Attention`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparsek_kernels import SparseKState, StateRows, sparsek_attention
from sparsek_kernels.state import SlotLayout
from torch import nn

from sparsek_cli.models.config import LayerBudget
from sparsek_vllm import engine
from sparsek_vllm.blocks import pool_of
from sparsek_vllm.warm_up import is_due, memory_like, warm_up

OPERATOR = "sparsek::serve"


class SparseKBackend(engine.AttentionBackend):
    """Tells vLLM how to prepare a step: as for state-space models."""

    @staticmethod
    def get_name() -> str:
        return "SPARSEK"

    @staticmethod
    def get_builder_cls() -> type[SparseKMetadataBuilder]:
        return SparseKMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("SparseKLayer computes its attention itself")

    @classmethod
    def is_ssm(cls) -> bool:
        return True


@dataclass
class SparseKMetadata(engine.BaseMambaAttentionMetadata):
    """Which requests decode, which read, and the block of each.

    Attributes:
        fresh: bool [requests that read], those that have read nothing yet; made by the first layer.
    """

    fresh: torch.Tensor | None = None


class SparseKMetadataBuilder(engine.BaseMambaAttentionMetadataBuilder[SparseKMetadata]):
    metadata_cls = SparseKMetadata
    needs_causal_conv1d_metadata = False


@engine.register_kv_cache_spec(manager_class=engine.MambaManager)
@dataclass(frozen=True)
class SparseKSpec(engine.MambaSpec):
    """One block per request and layer; blocks of different layers differ in size."""

    def is_uniform_with_collection(self, kv_cache_specs) -> bool:
        """One group whatever the sizes: a request has one block of each layer."""

        def schedule(spec):
            return spec.block_size, spec.num_speculative_blocks, spec.mamba_cache_mode

        return all(
            isinstance(spec, SparseKSpec) and schedule(spec) == schedule(self)
            for spec in kv_cache_specs.values()
        )


class SparseKLayer(nn.Module, engine.MambaBase):
    """SparseK attention over blocks of a pool that vLLM manages.

    Args:
        name: under which vLLM knows the layer.
        budget: of all KV heads. heads: those of this rank, in order. queries: its query heads.
        bytes_per_block: what a block takes on the rank that needs most.
        scorer: the checkpoint's, for all KV heads; its parameters belong to the attention block.
    """

    def __init__(
        self,
        name: str,
        *,
        budget: LayerBudget,
        heads: list[int],
        all_heads: int,
        queries: list[int],
        head_dim: int,
        scale: float,
        dtype: torch.dtype,
        bytes_per_block: int,
        scorer: nn.Module,
    ):
        super().__init__()
        self.name, self.scale, self.dtype = name, scale, dtype
        self.heads, self.query_heads, self.head_dim = len(heads), len(queries), head_dim
        topk = budget.topk
        every = (topk,) * all_heads if isinstance(topk, int) else topk
        self.layout = SlotLayout(tuple(every[head] for head in heads), budget.window, budget.sinks)
        self.bytes_per_block = bytes_per_block
        # Not a submodule: its weights are named as the block's, and stand there once.
        self._scorer = [scorer]
        self.kv_cache = (torch.tensor([]),)
        self._pool: tuple[torch.Tensor, SparseKState] | None = None
        # None where they are all, in the scorer's order.
        own = None if heads == list(range(all_heads)) else torch.tensor(heads)
        self.register_buffer("own_heads", own, persistent=False)
        self.register_buffer("own_queries", torch.tensor(queries), persistent=False)

    @property
    def mamba_type(self) -> engine.MambaAttentionBackendEnum:
        return engine.MambaAttentionBackendEnum.CUSTOM

    def get_state_shape(self) -> tuple[tuple[int, ...]]:
        return ((self.bytes_per_block,),)

    def get_state_dtype(self) -> tuple[torch.dtype]:
        return (torch.int8,)

    def get_kv_cache_spec(self, vllm_config) -> SparseKSpec:
        plain = super().get_kv_cache_spec(vllm_config)
        return SparseKSpec(
            shapes=plain.shapes,
            dtypes=plain.dtypes,
            block_size=plain.block_size,
            mamba_type=plain.mamba_type,
            mamba_cache_mode=plain.mamba_cache_mode,
            num_speculative_blocks=plain.num_speculative_blocks,
        )

    @property
    def pool(self) -> SparseKState:
        """The blocks that vLLM gave this layer, in whatever way: `kv_cache` is what it sets."""
        blocks = self.kv_cache[0]
        if self._pool is None or self._pool[0] is not blocks:
            self._pool = blocks, self._pool_of(blocks)
        return self._pool[1]

    def _pool_of(self, blocks: torch.Tensor) -> SparseKState:
        return pool_of(blocks, self.layout, self.head_dim, self.dtype)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        hidden_states: torch.Tensor,
    ) -> torch.Tensor:
        """[N, heads * head size] of this rank, as vLLM's `Attention`; hidden_states [N, C]."""
        output = torch.empty_like(query)
        torch.ops.sparsek.serve(query, key, value, hidden_states, output, self.name)
        return output

    @torch.no_grad()
    def attend(self, query, key, value, hidden_states, output, metadata: SparseKMetadata) -> None:
        """Fills `output` [N, heads * head size]; requests that decode come first, one token each.

        Rows beyond the last token, which vLLM adds to fill a graph, belong to its null block.
        """
        tensors = query, key, value, hidden_states
        if is_due(self.layout, query):
            warm_up(self._attend, tensors, self._pool_of(memory_like(self.kv_cache[0])))
        self._attend(*tensors, output, metadata, self.pool)

    def _attend(self, query, key, value, hidden_states, output, metadata, pool) -> None:
        scores, slopes, *stand_ins = self._scorer[0](hidden_states[None])
        scores = scores[0]  # [G, N]
        if self.own_heads is not None:
            scores, slopes = (x.index_select(0, self.own_heads) for x in (scores, slopes))
        settings = {
            "topk": self.layout.topk,
            "window": self.layout.window,
            "sinks": self.layout.sinks,
            "slopes": slopes,
            "scale": self.scale,
        }
        for pairs in stand_ins:  # of all query heads
            own = pairs.shape[0] == self.query_heads and self.own_heads is None
            settings["stand_ins"] = pairs if own else pairs.index_select(0, self.own_queries)
        decodes = reads = 0
        if metadata.num_decodes:
            rows = metadata.state_indices_tensor_d[:, 0]
            decodes = rows.shape[0]
            sparsek_attention(
                *(self._one_each(x, decodes) for x in (query, key, value)),
                scores[:, :decodes].T[:, :, None],
                state=StateRows(pool, rows),
                out=self._one_each(output, decodes),
                **settings,
            )
        if metadata.num_prefills:
            reads = metadata.num_prefill_tokens
            tokens = slice(decodes, decodes + reads)
            rows = metadata.state_indices_tensor_p
            sparsek_attention(
                *(self._in_a_row(x, tokens) for x in (query, key, value)),
                scores[None, :, tokens],
                cu_seqlens=metadata.query_start_loc_p,
                state=StateRows(pool, rows, fresh=_fresh(metadata)),
                out=self._in_a_row(output, tokens),
                **settings,
            )
        if decodes + reads < output.shape[0]:
            output[decodes + reads :] = 0

    def _one_each(self, x: torch.Tensor, count: int) -> torch.Tensor:
        """[count, heads, 1, head size] of [N, heads * head size]: the first tokens, each alone."""
        return x.view(x.shape[0], -1, 1, self.head_dim)[:count]

    def _in_a_row(self, x: torch.Tensor, tokens: slice) -> torch.Tensor:
        """[1, heads, tokens, head size] of [N, heads * head size]."""
        x = x.view(1, x.shape[0], -1, self.head_dim).transpose(1, 2)
        return x if tokens == slice(0, x.shape[2]) else x[:, :, tokens]


def _fresh(metadata: SparseKMetadata) -> torch.Tensor:
    """See `SparseKMetadata.fresh`: the same for all layers of a step."""
    if getattr(metadata, "fresh", None) is None:
        metadata.fresh = ~metadata.has_initial_states_p
    return metadata.fresh


def _serve(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden_states: torch.Tensor,
    output: torch.Tensor,
    name: str,
) -> None:
    """A layer as torch.compile sees it: one opaque node. The layer's state is no argument of it."""
    context = engine.get_forward_context()
    metadata = context.attn_metadata
    if not metadata:  # vLLM measures memory, or tunes a GPU: no request is there
        output.zero_()
        return
    layer = context.no_compile_layers[name]
    layer.attend(query, key, value, hidden_states, output, metadata[name])


# Not `custom_op`, whose checks take the CPU longer than a launch.
_LIBRARY = torch.library.Library(OPERATOR.split("::")[0], "FRAGMENT")
_LIBRARY.define("serve" + torch.library.infer_schema(_serve, mutates_args=("output",)))
_LIBRARY.impl("serve", _serve, "CompositeExplicitAutograd")
_LIBRARY._register_fake("serve", lambda *_: None)


def register_layer() -> None:
    """Make the backend known, and compiled graphs be cut at our operator."""
    path = f"{SparseKBackend.__module__}.{SparseKBackend.__qualname__}"
    engine.register_backend(engine.MambaAttentionBackendEnum.CUSTOM, path, is_mamba=True)
    engine.split_at(OPERATOR)
