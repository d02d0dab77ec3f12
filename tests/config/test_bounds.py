"""Every number among the settings has its limits, and a mistake is said of the member of a union that was meant."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from test_config import sections

from wrinklefree.config.compose import load_config
from wrinklefree.config.schema import Config
from wrinklefree.core.errors import UserError
from wrinklefree.core.method import available, find


def numbers(hint: Any, limits: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The limits of every number in an annotation."""
    if hint in (int, float):
        yield limits
    for part in get_args(hint) if get_origin(hint) is not None else ():
        if isinstance(part, type) or get_origin(part) is not None:
            yield from numbers(part, (*limits, *found(hint)))


def found(hint: Any) -> list[Any]:
    fields = [one for one in get_args(hint) if isinstance(one, FieldInfo)] if get_origin(hint) is Annotated else []
    return [limit for field in fields for limit in field.metadata]


def settings() -> Iterator[tuple[str, Any]]:
    for cls, prefix in [*sections(Config), *((find(name), f"method {name}.") for name in available())]:
        hints = get_type_hints(cls, include_extras=True)
        yield from ((f"{prefix}{f.name}", hints[f.name]) for f in dataclasses.fields(cls))


def test_every_number_has_an_upper_and_a_lower_limit() -> None:
    checked = 0
    for path, hint in settings():
        for limits in numbers(hint):
            assert any(isinstance(limit, Ge | Gt) for limit in limits), path
            assert any(isinstance(limit, Le | Lt) for limit in limits), path
            checked += 1
    assert checked > 80


SAID = {
    "training.total_tokens=abc": "training.total_tokens: input should be a whole number or 'auto', got 'abc'",
    "training.total_tokens=0": "training.total_tokens: input should be greater than 0, got 0",
    "training.total_tokens=1.5": "training.total_tokens: input should be a whole number or 'auto', got 1.5",
    "training.optimizer.lr=fast": "training.optimizer.lr: input should be a number or 'auto', got 'fast'",
    "training.optimizer.lr=nan": "training.optimizer.lr: input should be",
    "training.optimizer.lr=inf": "training.optimizer.lr: input should be less than or equal to",
    "training.optimizer.betas=[0.9,1]": "training.optimizer.betas.1: input should be less than 1, got 1",
    "training.optimizer.betas=[-0.1,0.9]": "training.optimizer.betas.0: input should be greater than or equal to 0",
    "seed=99999999999999999999": "seed: input should be less than 9223372036854775808",
    "seed=-1": "seed: input should be greater than or equal to 0, got -1",
    "training.batch_size=99999999999": "training.batch_size: input should be less than 2147483648",
    "distillation.attention.layer=99999": "distillation.attention.layer: input should be less than or equal to 10000",
    "data.enable_thinking=maybe": "data.enable_thinking: input should be False, True, 'both', 'none' or 'all', got",
}


@pytest.mark.parametrize("override", SAID)
def test_a_number_out_of_its_limits_is_one_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(["model=tiny", "training=fairy2_w2", override])
    assert str(caught.value).startswith(SAID[override])
    assert "\n" not in str(caught.value)
