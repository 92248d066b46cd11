"""The `sparsek` block of a converted model's config.json: what it may hold and how it is read.

```json
"sparsek": {"topk": 380, "window": 128, "sinks": 4, "gate": "straight_through",
            "scorer": {"type": "linear"}}
```
`"cache_dtype": "int8"` is there where the cache holds keys and values in 8 bits; without it they
are in the model's own dtype.
A scorer of type `mlp` also has a `width`, the units of its hidden layer (128). With `stand_ins`: 1
it and a linear one hold so many pairs of each query head that stand in for evicted ones.
`topk` is one integer, or a list with one entry per layer, each an integer or a list with one
integer per KV head; null for layers that do not attend to everything, which stay as they are.
Every KV head of the others keeps sinks + topk + window pairs, always.

In a file the block is whole; a config that is made in Python may leave out what has a default.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from sparsek_cli.converted import ATTENTION, check_whole_settings
from sparsek_cli.errors import UsageError
from sparsek_cli.families.by_layer import head_dim_of, kv_heads_of, shared_layers
from sparsek_cli.families.causal import check_alone
from sparsek_cli.families.layers import full_layers
from sparsek_cli.families.original_length import check_original
from sparsek_cli.families.positions import check_one_rope
from sparsek_cli.families.remote_code import REMOTE_CODE_FILE, remote_code_text
from sparsek_cli.families.rope_beside import check_beside
from sparsek_cli.families.rotary_base import check_base
from sparsek_cli.recipes.limits import MOST_SLOTS, MOST_UNITS

GATES = ("straight_through", "log", "kv")
# linear: scores are a linear map of the attention block's input. mlp: that and a hidden layer.
# random: a rival to train, pairs kept by a hash of their position.
SCORERS = ("linear", "mlp", "random")
MLP_WIDTH = 128
MOST_STAND_INS = 16
CACHE_DTYPES = ("auto", "int8")  # auto: the model's own, and no key in the block
_LOOKED_AT = ("rope_parameters", "rope_scaling", "is_encoder_decoder", "add_cross_attention")
DENSE_ATTENTION = "sparsek_dense"  # the same weights, attending densely; only on request
DEFAULTS: dict[str, Any] = {
    "topk": 380,
    "window": 128,
    "sinks": 4,
    "gate": "straight_through",
    "scorer": {"type": "linear"},
}


@dataclass(frozen=True)
class LayerBudget:
    """What one layer's attention needs to know.

    Attributes:
        topk: selected pairs, one integer for all KV heads or a tuple with one per head.
        window: most recent tokens always seen, the query's own included; >= 1.
        sinks: first tokens always seen; >= 0.
        gate: one of `GATES` (method: straight_through, log, or the paper's kv).
        cache_dtype: one of `CACHE_DTYPES`.
    """

    topk: int | tuple[int, ...]
    window: int
    sinks: int
    gate: str
    cache_dtype: str = "auto"


def own_attention(name: str | None) -> str:
    """The attention function of a converted model that asks for `name`.

    None, which many loaders pass for "as you like", is SparseK. So is every name of ours
    (`sparsek`, `sparsek_dense`, and what training registers); transformers' names would make the
    model dense, with a cache that grows, and nobody would see it.

    Raises:
        UsageError: a name that is not ours.
    """
    if name is None:
        return ATTENTION
    if not name.startswith(ATTENTION):
        raise UsageError(
            f"attention {name!r} would switch SparseK off in a converted model",
            hint="leave attn_implementation out; dense attention has a name of its own: "
            f'attn_implementation="{DENSE_ATTENTION}", or models.dense_attention(model)',
        )
    return name


def kv_heads(config: Any) -> int:
    """Number of KV heads of each layer with SparseK attention."""
    return kv_heads_of(config, _first(config))


def head_dim(config: Any) -> int:
    """Size of one head of the layers with SparseK attention."""
    return head_dim_of(config, _first(config))


def _first(config: Any) -> int:
    """A layer whose sizes those of all with SparseK attention are."""
    return next(iter(sparse_layers(config)), 0)


def sparse_layers(config: Any) -> tuple[int, ...]:
    """The layers that have SparseK attention: those that attend to everything, in keys of theirs.

    Layers that read the keys of one of these attend by its scores and slots.
    """
    types = getattr(config, "layer_types", None)
    if not types:
        return tuple(range(config.num_hidden_layers))
    return full_layers(types, shared_layers(config))


def layer_budget(config: Any, layer: int) -> LayerBudget:
    """The budget of one layer, read from `config.sparsek` (already checked)."""
    block = config.sparsek
    topk = block["topk"]
    if isinstance(topk, list):
        topk = topk[layer]
        topk = tuple(topk) if isinstance(topk, list) else topk
    stored = block.get("cache_dtype", "auto")
    return LayerBudget(topk, block["window"], block["sinks"], block["gate"], stored)


def check_settings(
    settings: Mapping[str, Any], *, layers: int, heads: int, sparse: Collection[int] | None = None
) -> dict[str, Any]:
    """Validate a `sparsek` block and return it complete, as plain JSON values.

    Args:
        settings: the block, missing keys take `DEFAULTS`.
        layers: number of layers of the model.
        heads: number of KV heads of each layer.
        sparse: the layers with SparseK attention, see `sparse_layers`; None: all of them.

    Raises:
        UsageError: an unknown key, a wrong type, or a value out of range; names the key.
    """
    known = (*DEFAULTS, "cache_dtype")
    for key in settings:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
            raise UsageError(f"sparsek settings have no key `{key}`", hint=hint)
    merged = {**DEFAULTS, **settings}
    checked: dict[str, Any] = {
        "topk": _check_topk(merged["topk"], layers=layers, heads=heads, sparse=sparse),
        "window": _check_integer("window", merged["window"], least=1),
        "sinks": _check_integer("sinks", merged["sinks"], least=0),
    }
    if merged["gate"] not in GATES:
        raise UsageError(f"gate is {merged['gate']!r}", hint=f"the gates are {', '.join(GATES)}")
    checked["gate"] = merged["gate"]
    checked["scorer"] = _check_scorer(merged["scorer"])
    stored = merged.get("cache_dtype", "auto")
    if stored not in CACHE_DTYPES:
        raise UsageError(
            f"cache_dtype is {stored!r}", hint=f"it is one of {', '.join(CACHE_DTYPES)}"
        )
    if stored != "auto":
        checked["cache_dtype"] = stored
    return checked


def _check_scorer(scorer: Any) -> dict[str, Any]:
    kind = scorer.get("type") if isinstance(scorer, Mapping) else None
    known = {"linear": {"stand_ins"}, "mlp": {"stand_ins", "width"}}.get(kind, set())
    if kind not in SCORERS or not scorer.keys() <= {"type", *known}:
        raise UsageError(
            f"scorer is {scorer!r}",
            hint=f'it is {{"type": ...}}, one of {", ".join(SCORERS)}; mlp may have a "width", mlp '
            'and linear may have "stand_ins"',
        )
    checked = {"type": kind}
    if kind == "mlp":
        width = scorer.get("width", MLP_WIDTH)
        checked["width"] = _check_integer("scorer.width", width, least=1, most=MOST_UNITS)
    if "stand_ins" in scorer:
        checked["stand_ins"] = _check_integer(
            "scorer.stand_ins", scorer["stand_ins"], least=1, most=MOST_STAND_INS
        )
    return checked


def _check_integer(name: str, value: Any, *, least: int, most: int = MOST_SLOTS) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(
            f"{name} is {value!r}, not a whole number", hint=f"give an integer >= {least}"
        )
    if value < least:
        raise UsageError(f"{name} is {value}", hint=f"{name} must be at least {least}")
    if value > most:
        raise UsageError(
            f"{name} is {value:,}, and {most:,} is the most that it may be",
            hint=f'correct {name}, which stands under "sparsek" in a config.json',
        )
    return value


def _check_topk(
    topk: Any, *, layers: int, heads: int, sparse: Collection[int] | None
) -> int | list[int | list[int] | None]:
    if not isinstance(topk, (list, tuple)):
        return _check_integer("topk", topk, least=0)
    if len(topk) != layers:
        raise UsageError(
            f"topk has {len(topk)} entries for {layers} layers",
            hint="give one integer, or one entry per layer",
        )
    checked: list[int | list[int] | None] = []
    for layer, entry in enumerate(topk):
        name = f"topk of layer {layer}"
        if sparse is not None and layer not in sparse:
            if entry is not None:
                raise UsageError(
                    f"{name} is {entry}, and that layer has no SparseK attention",
                    hint="null stands for layers that do not attend to everything",
                )
            checked.append(None)
        elif isinstance(entry, (list, tuple)):
            if len(entry) != heads:
                raise UsageError(
                    f"{name} has {len(entry)} entries for {heads} KV heads",
                    hint="give one integer, or one per KV head",
                )
            checked.append([_check_integer(name, value, least=0) for value in entry])
        else:
            checked.append(_check_integer(name, entry, least=0))
    return checked


class SparseKConfigMixin:
    """What every `sparsek_<type>` config adds to its family's config.

    `sparsek` is checked and completed on construction, the attention function is ours whoever
    loads the model (see `own_attention`; it is not among the things transformers saves), and every
    save also writes the file `auto_map` names.
    """

    @property
    def _attn_implementation(self) -> str:
        # Every way of naming an attention function sets it: loaders, from_config, config files.
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | Mapping[str, str] | None) -> None:
        if isinstance(value, Mapping):  # of several configs' values, "" names this one's
            value = value.get("", getattr(self, "_attn_implementation_internal", None))
        self._attn_implementation_internal = own_attention(value)

    def __post_init__(self, **kwargs: Any) -> None:
        # Imported here: registration derives classes from this one.
        from sparsek_cli.models.registration.tables import register_classes

        register_classes(self.model_type)
        super().__post_init__(**kwargs)
        self.sparsek = check_settings(
            self.sparsek or {},
            layers=self.num_hidden_layers,
            heads=kv_heads(self),
            sparse=sparse_layers(self),
        )
        self.auto_map = {
            "AutoConfig": f"{REMOTE_CODE_FILE.removesuffix('.py')}.{type(self).__name__}",
            **{
                auto: f"{REMOTE_CODE_FILE.removesuffix('.py')}.{name}"
                for auto, name in self.model_names.items()
            },
        }
        self.validate()  # derived classes have the base's checks, and nobody calls them

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config that a file's content describes; every loader comes by here.

        Raises:
            UsageError: the `sparsek` block, there or among `kwargs`, is not whole; or rotary
                positions are not said where they are read; or it has an encoder.
        """
        if "sparsek" in kwargs:  # else set after the checks
            config_dict = {**config_dict, "sparsek": kwargs.pop("sparsek")}
        name = kwargs.get("name_or_path") or config_dict.get("_name_or_path")
        check_whole_settings(
            config_dict.get("sparsek"), f"'{name}'" if name else f"a {cls.model_type} model"
        )
        given = {key: kwargs[key] for key in _LOOKED_AT if key in kwargs}
        for check in (check_one_rope, check_base, check_beside, check_original, check_alone):
            check({**config_dict, **given})
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: Any) -> Any:
        """As `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds; transformers leaves the attention's name out."""
        return super().to_diff_dict() | {"attn_implementation": ATTENTION}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any):
        """Write config.json and, beside it, the file its `auto_map` names."""
        from pathlib import Path

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REMOTE_CODE_FILE).write_text(remote_code_text(), encoding="utf-8")
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to do: the default would copy this package's sources into every save."""
