"""Whether SparseK attention ran, by its calls and the cache it left; never by answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def counted_attention() -> Iterator[list[int]]:
    """The layers that called SparseK attention while the block ran, in order."""
    from sparsek_cli.models.attention.registration import replaced_attention

    layers: list[int] = []

    def counting(attend: Callable) -> Callable:
        def counted(module, *args, **kwargs):
            layers.append(module.layer_idx)
            return attend(module, *args, **kwargs)

        return counted

    with replaced_attention("sparsek", counting):
        yield layers


def assert_sparse(model, *, tokens: int = 40) -> None:
    """A forward pass calls SparseK once per layer and leaves a SparseKCache of its budget."""
    from sparsek_cli.models import SparseKCache, sparsek_cache_bytes

    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
    with counted_attention() as layers, torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    config = model.config
    assert layers == list(range(config.num_hidden_layers))
    assert type(cache) is SparseKCache
    assert cache.nbytes == sparsek_cache_bytes(config, cache.layers[0].keys.dtype)


def assert_dense(model, *, tokens: int = 40) -> None:
    """A forward pass never calls SparseK and leaves a cache of every token."""
    from sparsek_cli.models import SparseKCache

    ids = torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(0))
    with counted_attention() as layers, torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert layers == []
    assert not isinstance(cache, SparseKCache)
    assert cache.layers[0].keys.shape[-2] == tokens
