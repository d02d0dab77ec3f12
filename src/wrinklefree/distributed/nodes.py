"""Several machines: each runs the same command, and three variables say which it is.

| variable | |
|---|---|
| WF_NODES | how many machines there are; without it there is one |
| WF_NODE | the number of this one, from 0 |
| WF_HEAD | the address of machine 0, at which all meet |
"""

import os
from dataclasses import dataclass

from wrinklefree.core.errors import UserError

PORT = 29511


@dataclass(frozen=True)
class Node:
    """One of `count` machines; `head` is the address of the first."""

    number: int
    count: int
    head: str

    def torchrun_options(self) -> list[str]:
        """How torchrun finds the other machines."""
        if self.count == 1:
            return ["--standalone"]
        host, _, port = self.head.partition(":")
        return [
            f"--nnodes={self.count}",
            f"--node_rank={self.number}",
            f"--master_addr={host}",
            f"--master_port={port or PORT}",
        ]


def this_node() -> Node:
    """The machine that this process is on. Raises UserError if the variables do not fit together."""
    values = {name: os.environ.get(name, "") for name in ("WF_NODES", "WF_NODE", "WF_HEAD")}
    if not values["WF_NODES"]:
        return Node(0, 1, "")
    count, number = (int(values[name]) if values[name].isdigit() else -1 for name in ("WF_NODES", "WF_NODE"))
    if not 0 <= number < count or (count > 1 and not values["WF_HEAD"]):
        told = ", ".join(f"{name}={value}" for name, value in values.items())
        raise UserError(f"{told}: WF_NODE has to be a number below WF_NODES, and WF_HEAD the address of machine 0")
    return Node(number, count, values["WF_HEAD"])
