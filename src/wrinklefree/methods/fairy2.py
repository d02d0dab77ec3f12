"""placeholder"""
from dataclasses import dataclass
from typing import ClassVar, Literal
from wrinklefree.core.method import QuantLinear, QuantMethod
@dataclass(kw_only=True)
class Config(QuantMethod):
    name: Literal["fairy2"] = "fairy2"
    num_stages: int = 2
    layer: ClassVar = QuantLinear
