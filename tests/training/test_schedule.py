"""Learning rates by real steps, and what `auto` comes to."""

import pytest

from wrinklefree.config.schema import ModelConfig, SchedulerConfig
from wrinklefree.core.errors import UserError
from wrinklefree.core.find import SCHEDULES, names
from wrinklefree.training.plan import Resolved, choose_lr, choose_steps, choose_tokens
from wrinklefree.training.schedule import rates as rates_of


def rates(name: str, max_steps: int, warmup: float = 0.05, decay: float = 0.15, floor: float = 0.0) -> list[float]:
    settings = SchedulerConfig(name=name, warmup_ratio=warmup, decay_ratio=decay, min_lr_ratio=floor)
    return [rates_of(settings)((step + 0.5) / max_steps) for step in range(max_steps)]


@pytest.mark.parametrize("max_steps", [100, 1000, 10_000])
def test_wsd_is_5_80_15_by_real_steps(max_steps: int) -> None:
    values = rates("wsd", max_steps)
    stable = [step for step, value in enumerate(values) if value == 1]
    assert stable == list(range(max_steps * 5 // 100, max_steps * 85 // 100))
    assert values[: stable[0]] == sorted(values[: stable[0]])
    assert values[stable[-1] :] == sorted(values[stable[-1] :], reverse=True)
    middle = max_steps * 925 // 1000
    assert values[middle] == pytest.approx(0.5, abs=10 / max_steps)


@pytest.mark.parametrize("name", names(SCHEDULES))
@pytest.mark.parametrize("max_steps", [1, 2, 10, 997])
def test_no_step_is_wasted(name: str, max_steps: int) -> None:
    """Every rate is above 0 and at most 1."""
    assert all(0 < value <= 1 for value in rates(name, max_steps))


@pytest.mark.parametrize("name", names(SCHEDULES))
def test_the_floor_is_where_it_ends(name: str) -> None:
    values = rates(name, 1000, floor=0.1)
    assert values[-1] == pytest.approx(0.1, abs=0.004)
    assert min(values[100:]) >= 0.1
    assert max(values) == pytest.approx(1, abs=0.002)


def test_cosine_and_linear_are_halfway_in_the_middle() -> None:
    for name in ("cosine", "linear"):
        assert rates(name, 1000, warmup=0.0)[500] == pytest.approx(0.5, abs=0.002)
    assert rates("cosine", 1000, warmup=0.0)[250] > rates("linear", 1000, warmup=0.0)[250] + 0.09


def test_without_warmup_and_decay_the_rate_is_constant() -> None:
    assert set(rates("wsd", 50, warmup=0.0, decay=0.0)) == {1.0}


# The training guide's tables.
GUIDE = {135e6: (1e-4, 500e6), 499e6: (1e-4, 500e6), 500e6: (5e-5, 1e9), 1.7e9: (5e-5, 1e9)}
GUIDE |= {4e9: (2e-5, 2e9), 7e9: (1e-5, 5e9), 70e9: (1e-5, 5e9)}


MODEL = ModelConfig(name="some", pretrained="some")
SMALL = ModelConfig(name="small", pretrained="small", auto_tokens=1000)


@pytest.mark.parametrize("size", GUIDE)
def test_auto_follows_the_guide_and_says_so(size: float) -> None:
    lr, tokens = choose_lr("auto", int(size)), choose_tokens("auto", int(size), MODEL)
    assert (lr.value, tokens.value) == GUIDE[size]
    assert lr.reason == f"table, {size / 1e6:.0f} M parameters"
    assert tokens.reason == lr.reason


def test_a_model_may_say_what_auto_comes_to() -> None:
    assert choose_tokens("auto", 10, SMALL).value == 1000


def test_what_is_set_wins() -> None:
    assert choose_lr(3e-4, 10).value == 3e-4
    assert choose_tokens(105, 10, SMALL).value == 105
    assert choose_steps(7, Resolved(100, "set"), 10).value == 7
    assert choose_steps(0, Resolved(100, "set"), 1000).value == 0
    assert choose_steps(None, Resolved(105, "set"), 10).value == 10


def test_less_than_a_step_is_an_error() -> None:
    with pytest.raises(UserError, match=r"total_tokens=9 is less than one step \(10 tokens\)"):
        choose_steps(None, Resolved(9, "set"), 10)
