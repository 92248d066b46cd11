"""The model families, as plain data: read by conversion without importing torch or transformers.

table     one row per family: add a family here
positions the longest text that a model was made for
original_length  whether a config.json says where its scaled positions start from
rotary_base  whether a config.json says the base of its rotary positions where it is read
row       what a row says
layers    which layers of a model attend to everything
by_layer  heads of single layers, where layers differ in them
causal    whether tokens see those after them, or an encoder's, which no converted model does
refusals  families that cannot be converted, and why
remote_code  the small file beside every converted checkpoint

Whoever needs something per family (registration, PEFT's targets, tests) iterates over
`TABLE.values()`; the classes that transformers needs are made from a row by `sparsek_cli.models`.
"""

from sparsek_cli.families.row import Row
from sparsek_cli.families.table import TABLE, check_supported, row_of

__all__ = ["TABLE", "Row", "check_supported", "row_of"]
