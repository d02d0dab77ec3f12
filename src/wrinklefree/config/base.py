"""Building blocks of the settings: a base class that refuses unknown keys, and number types with limits."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]

Natural = Annotated[int, Field(ge=0)]

PositiveFloat = Annotated[float, Field(gt=0)]

NonNegative = Annotated[float, Field(ge=0)]

Fraction = Annotated[float, Field(ge=0, le=1)]

Auto = Literal["auto"]


@dataclass(kw_only=True)
class Node:
    """Base class for the sections of the settings. Unknown keys are errors."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")
