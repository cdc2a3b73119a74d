"""What the plans have in common: they hold addresses, so they keep the memory behind them."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ._library import operator


class Plan:
    """A plan of one operator: checked and packed when it is made, enqueued by `run`.

    It owns aliases of the tensors that it was made from: assigning to the `data` of one of those, or calling
    its `set_`, neither changes nor frees the memory that the plan reads and writes. Resizing a storage in
    place would: do not. A captured graph does not own the plan: keep it as long as the graph.

    `run` may be compiled (`torch.compile`, fullgraph). Compiled code names the tensors themselves, so that a
    compiler knows what is read and written.
    """

    device_type: str
    launches: int
    """Kernel launches of one run."""

    def __init__(self, device_type: str, name: str, *arguments: Any, run_name: str = "") -> None:
        """`arguments`: of the operator `<name>_plan`. `run_name`: by default `<name>_run`."""
        make, self._once = (operator(device_type, f"{name}_{kind}") for kind in ("plan", "once"))
        self.device_type = device_type
        self._arguments = arguments
        self._memory = [_alias(argument) for argument in arguments]
        self._plan = make(*self._memory)  # uint8 on the CPU: csrc/plan.h
        self.run_name = run_name or f"{name}_run"
        self._run = operator(device_type, self.run_name)
        self.launches = int(self._plan[8:16].view(torch.int64)[0])  # PlanHeader::num_launches

    def _enqueue(self, *integers: int) -> None:
        if torch.compiler.is_compiling():
            self._once(*self._arguments, *integers)
        else:
            self._run(self._plan, *integers)

    @property
    def address(self) -> int:
        """Of the packed plan, which lives as long as this object."""
        return self._plan.data_ptr()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} holds addresses of tensors: it cannot be copied or pickled")


def _alias(argument: Any) -> Any:
    """A tensor object of our own on the same memory; of lists, of each element."""
    if isinstance(argument, torch.Tensor):
        return argument.detach()
    return [_alias(element) for element in argument] if isinstance(argument, list) else argument
