"""What processes tell one another is, for one process alone, what it has itself."""

import torch
from torch import nn
from toyrun import CPU

from wrinklefree.distributed.sharding import Whole
from wrinklefree.distributed.world import any_of, gather, sum_over_processes


def test_one_process_needs_no_group() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    Whole(CPU).finish_gradients([parameter, nn.Parameter(torch.ones(1))], 0.5)
    assert parameter.grad.tolist() == [0.5, 1]
    assert gather({"a": 1}, CPU) == [{"a": 1}]
    assert sum_over_processes({"a": torch.tensor(3), "b": torch.tensor(0.5)}, CPU) == {"a": 3, "b": 0.5}
    assert any_of(True, CPU)
    assert not any_of(False, CPU)
