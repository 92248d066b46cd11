"""Everything that libraries look up by model_type, class or class name, in one place.

A converted model has a type and classes of its own. Whatever is known about its family by name
would be lost with the name: which tokenizer class a checkpoint gets, which tensors its files
rename, what a pipeline supports, what PEFT adapts. `register` makes each table say of
`sparsek_<type>` what it says of `<type>`; what a table says by inheritance (`isinstance`, class
attributes) needs no entry. Tables of libraries that may be imported later are filled when they
are (`after_import.py`).

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
| lm-eval | name of a kind of model | `sparsek`; its command line imports no other package |
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping
from functools import cache
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

from sparsek_cli.families import TABLE, Row
from sparsek_cli.models.registration.after_import import after_import
from sparsek_cli.models.registration.classes import FAMILIES, Family, family_of


def register() -> None:
    """Enter every family by its type; a second call changes nothing.

    Its classes follow when its first config is made: see `register_classes`.
    """
    for family in FAMILIES.values():
        AutoConfig.register(family.sparsek_type, family.sparsek_config, exist_ok=True)
        _register_type(family.row)
    after_import("peft.utils.constants", _register_peft)
    after_import("liger_kernel.transformers.monkey_patch", _register_liger)
    after_import("lm_eval.models", _register_lm_eval)
    after_import("transformers.cli.serving.utils", _register_serving)


@cache
def register_classes(sparsek_type: str) -> None:
    """Enter a family's derived classes, before whoever holds a config of it looks for them."""
    family = family_of(sparsek_type)
    AutoModel.register(family.sparsek_config, family.sparsek_model, exist_ok=True)
    AutoModelForCausalLM.register(family.sparsek_config, family.sparsek_causal_lm, exist_ok=True)
    tokenizer = TOKENIZER_MAPPING.get(family.config, None)
    if tokenizer is not None:
        TOKENIZER_MAPPING.register(family.sparsek_config, tokenizer, exist_ok=True)
    # transformers imports itself twice, and whoever was first (its own server is) holds another
    # module than the rest. Both are of one class.
    modules = type(sys.modules["transformers"])
    for cls in (family.sparsek_config, family.sparsek_model, family.sparsek_causal_lm):
        setattr(modules, cls.__name__, cls)
    _register_tensors(family.model.__name__, family.sparsek_model.__name__)
    _register_tensors(family.causal_lm.__name__, family.sparsek_causal_lm.__name__)
    _register_outputs(family)


def _register_type(row: Row) -> None:
    """Tables that hold types and names: tokenizers, modules, causal LMs, renamed tensors."""
    if row.model_type in TOKENIZER_MAPPING_NAMES:
        TOKENIZER_MAPPING_NAMES[row.sparsek_type] = TOKENIZER_MAPPING_NAMES[row.model_type]
    if row.model_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(row.sparsek_type)
    module = model_type_to_module_name(row.model_type)
    SPECIAL_MODEL_TYPE_TO_MODULE_NAME[row.sparsek_type] = module
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[row.sparsek_type] = f"SparseK{row.causal_lm}"
    _register_tensors(row.model_type, row.sparsek_type)


def _register_tensors(dense: str, sparse: str) -> None:
    """Tensors that files name differently (GPT-NeoX's embed_out), by type or class name."""
    renames = get_checkpoint_conversion_mapping(dense)
    if renames is not None:
        register_checkpoint_conversion_mapping(sparse, renames, overwrite=True)


def _register_outputs(family: Family) -> None:
    """What can be recorded, which transformers enters when an instance is made.

    The base model inside a causal LM (and the decoder inside that) is made as the family's and
    changes class afterwards.
    """
    for cls in (family.sparsek_model, family.sparsek_decoder):
        if cls is not None:
            _CAN_RECORD_REGISTRY.update({str(cls): cls._can_record_outputs})


def _copy_entries(table: MutableMapping[Any, Any]) -> None:
    for row in TABLE.values():
        if row.model_type in table:
            table.setdefault(row.sparsek_type, table[row.model_type])


def _register_peft(constants: ModuleType) -> None:
    """Every method's default target modules; methods look into these very dictionaries."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            _copy_entries(table)


def _register_liger(monkey_patch: ModuleType) -> None:
    _copy_entries(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN)


def _register_lm_eval(lm_eval_models: ModuleType) -> None:
    """`simple_evaluate(model="sparsek", ...)`; its own class for checkpoints runs sparsely."""
    from lm_eval.api.registry import model_registry

    model_registry.register("sparsek", target=lm_eval_models.MODEL_MAPPING["hf"])


def _register_serving(utils: ModuleType) -> None:
    """Templates by which a server reads tool calls: keyed by tuples of types."""
    table = utils._RESPONSE_TEMPLATE_FALLBACKS
    for types in list(table):
        ours = [row.sparsek_type for row in TABLE.values() if row.model_type in types]
        table[(*types, *ours)] = table.pop(types)
    of_type = utils.get_response_template

    def fitting(processor: Any, model: Any) -> Any:
        """None where a type's template does not fit the chat template: the prompt would be a reply.

        A reader that does not find what a reply begins with takes the whole prompt for one.
        """
        template = of_type(processor, model)
        tokenizer = getattr(processor, "tokenizer", processor)
        own = getattr(tokenizer, "response_template", None) is not None
        if template is None or own or not model.config.model_type.startswith("sparsek_"):
            return template
        begins = template.get("start_anchor") or ()
        begins = (begins,) if isinstance(begins, str) else begins
        written = str(getattr(tokenizer, "chat_template", None))
        return template if any(begin.strip() in written for begin in begins) else None

    utils.get_response_template = fitting
