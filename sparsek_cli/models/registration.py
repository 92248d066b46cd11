"""Everything that libraries look up by model_type, class or class name, in one place.

A converted model has a type and classes of its own. Whatever is known about its family by name
would be lost with the name: which tokenizer class a checkpoint gets, which tensors its files
rename, what a pipeline supports, what PEFT adapts. `register` makes each table say of
`sparsek_<type>` what it says of `<type>`; what a table says by inheritance (`isinstance`, class
attributes) needs no entry. Tables of libraries that may be imported later are filled when they
are (`imports.py`).

| library | looked up by | table |
| --- | --- | --- |
| transformers | type | AutoConfig, AutoModel, AutoModelForCausalLM |
| transformers | type, config class | tokenizer class; types whose files name a wrong one |
| transformers | type | module of a type, names of causal LMs (pipelines, lm-eval's backend) |
| transformers | class name | `transformers.<class>` (`transformers serve`, pipelines) |
| transformers | class, type | tensors that files name differently |
| transformers | class | which outputs can be recorded (`output_hidden_states`) |
| transformers | type | templates of replies with tool calls (`transformers serve`) |
| PEFT | type | default target modules of every method, prefix tuning's cache layout |
| Liger | type | the function that patches a model |
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from types import ModuleType
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto.auto_mappings import SPECIAL_MODEL_TYPE_TO_MODULE_NAME
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING,
    TOKENIZER_MAPPING_NAMES,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from sparsek_cli.models.families import FAMILIES, Family
from sparsek_cli.models.imports import after_import


def register() -> None:
    """Enter every family's derived classes; a second call changes nothing."""
    for family in FAMILIES.values():
        _register_classes(family)
        _register_tokenizer(family)
        _register_names(family)
        _register_tensors(family)
        _register_outputs(family)
    after_import("peft.utils.constants", _register_peft)
    after_import("liger_kernel.transformers.monkey_patch", _register_liger)
    after_import("transformers.cli.serving.utils", _register_serving)


def _register_classes(family: Family) -> None:
    AutoConfig.register(family.sparsek_type, family.sparsek_config, exist_ok=True)
    AutoModel.register(family.sparsek_config, family.sparsek_model, exist_ok=True)
    AutoModelForCausalLM.register(family.sparsek_config, family.sparsek_causal_lm, exist_ok=True)


def _register_tokenizer(family: Family) -> None:
    """AutoTokenizer chooses by the type, and by the config's class where the type says nothing."""
    if family.model_type in TOKENIZER_MAPPING_NAMES:
        TOKENIZER_MAPPING_NAMES[family.sparsek_type] = TOKENIZER_MAPPING_NAMES[family.model_type]
    if family.model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(family.sparsek_type)
    tokenizer = TOKENIZER_MAPPING.get(family.config, None)
    if tokenizer is not None:
        TOKENIZER_MAPPING.register(family.sparsek_config, tokenizer, exist_ok=True)


def _register_names(family: Family) -> None:
    """Classes by name: in tables that hold names, and as what such a name is looked up on."""
    module = model_type_to_module_name(family.model_type)
    SPECIAL_MODEL_TYPE_TO_MODULE_NAME[family.sparsek_type] = module
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.sparsek_type] = family.sparsek_causal_lm.__name__
    # transformers may have imported itself twice; what libraries look at is the last of them.
    transformers = sys.modules["transformers"]
    for cls in (family.sparsek_config, family.sparsek_model, family.sparsek_causal_lm):
        setattr(transformers, cls.__name__, cls)


def _register_tensors(family: Family) -> None:
    """Tensors that files name differently (GPT-NeoX's embed_out)."""
    for dense, sparse in (
        (family.model_type, family.sparsek_type),
        (family.model.__name__, family.sparsek_model.__name__),
        (family.causal_lm.__name__, family.sparsek_causal_lm.__name__),
    ):
        renames = get_checkpoint_conversion_mapping(dense)
        if renames is not None:
            register_checkpoint_conversion_mapping(sparse, renames, overwrite=True)


def _register_outputs(family: Family) -> None:
    """What can be recorded, which transformers enters when an instance is made.

    The base model inside a causal LM is made as the family's and changes class afterwards.
    """
    recordable = family.model._can_record_outputs
    _CAN_RECORD_REGISTRY.update({str(family.sparsek_model): recordable})


def _copy_entries(table: MutableMapping[Any, Any]) -> None:
    for family in FAMILIES.values():
        if family.model_type in table:
            table.setdefault(family.sparsek_type, table[family.model_type])


def _register_peft(constants: ModuleType) -> None:
    """Every method's default target modules; methods look into these very dictionaries."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            _copy_entries(table)


def _register_liger(monkey_patch: ModuleType) -> None:
    _copy_entries(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)


def _register_serving(utils: ModuleType) -> None:
    """Templates by which a server reads tool calls: keyed by tuples of types."""
    table = utils._RESPONSE_TEMPLATE_FALLBACKS
    for types in list(table):
        ours = [f.sparsek_type for f in FAMILIES.values() if f.model_type in types]
        table[(*types, *ours)] = table.pop(types)
