"""Building blocks of the settings: a base class that refuses unknown keys, numbers with limits, errors in a line."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError

LARGEST = 2**31  # no count of steps, rows or columns is larger; torch's sizes and seeds overflow at 2**63

Positive = Annotated[int, Field(gt=0, lt=LARGEST)]

Natural = Annotated[int, Field(ge=0, lt=LARGEST)]

Tokens = Annotated[int, Field(gt=0, lt=2**53)]

Seed = Annotated[int, Field(ge=0, lt=2**63)]

LayerNumber = Annotated[int, Field(ge=-10_000, le=10_000)]  # negative numbers count from the last layer

# The upper limit refuses infinity too, and both refuse NaN.
PositiveFloat = Annotated[float, Field(gt=0, le=1e12)]

NonNegative = Annotated[float, Field(ge=0, le=1e12)]

Beta = Annotated[float, Field(ge=0, lt=1)]

Fraction = Annotated[float, Field(ge=0, le=1)]

Share = Annotated[float, Field(gt=0, le=1)]

Auto = Literal["auto"]


@dataclass(kw_only=True)
class Node:
    """Base class for the sections of the settings. Unknown keys are errors."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


def first_problem(error: ValidationError) -> str:
    """Return the first of pydantic's complaints as `path.to.key: what is wrong`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
