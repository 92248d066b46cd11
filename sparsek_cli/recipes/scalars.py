"""Switches and numbers of recipes: each of its own type, in bounds, and never made of another one.

A word that is quoted, `true` where a number belongs, or 3.0 where things are counted are mistakes:
whoever wrote them meant something else, or wrote another key's value. Of words one kind is taken
for a number, quoted or not, for YAML 1.1 makes a word of it: digits with an exponent, as 1e-4.
"""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, Strict, StrictBool, StrictInt

from sparsek_cli.recipes.limits import LARGEST, LONGEST, MOST_COUNTED

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


def _with_exponent(value: object) -> object:
    """1e-4 without a dot, or without the exponent's sign, is a word to YAML 1.1."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value)
    return value


Switch = StrictBool
Float = Annotated[float, Strict(), BeforeValidator(_with_exponent)]
NotNegative = Annotated[Float, Field(ge=0, le=LARGEST)]
Positive = Annotated[Float, Field(gt=0, le=LARGEST)]
Share = Annotated[Float, Field(ge=0, le=1)]
Whole = Annotated[StrictInt, Field(ge=0, le=MOST_COUNTED)]
Count = Annotated[StrictInt, Field(ge=1, le=MOST_COUNTED)]
Length = Annotated[StrictInt, Field(ge=1, le=LONGEST)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
