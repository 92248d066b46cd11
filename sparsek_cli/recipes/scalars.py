"""Switches and numbers of recipes: each of its own type, in bounds, and never made of another one.

A word that is quoted, `true` where a number belongs, or 3.0 where things are counted are mistakes:
whoever wrote them meant something else, or wrote another key's value.
"""

from typing import Annotated

from pydantic import Field, Strict, StrictBool, StrictInt

from sparsek_cli.recipes.limits import LARGEST, LONGEST, MOST_COUNTED

Switch = StrictBool
Float = Annotated[float, Strict()]
NotNegative = Annotated[Float, Field(ge=0, le=LARGEST)]
Positive = Annotated[Float, Field(gt=0, le=LARGEST)]
Share = Annotated[Float, Field(ge=0, le=1)]
Whole = Annotated[StrictInt, Field(ge=0, le=MOST_COUNTED)]
Count = Annotated[StrictInt, Field(ge=1, le=MOST_COUNTED)]
Length = Annotated[StrictInt, Field(ge=1, le=LONGEST)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
