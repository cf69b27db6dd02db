"""A trainer's optimizer: a faster update, and the parameters that a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch


def update_in_one_pass(optimizer: torch.optim.Optimizer) -> None:
    """Let Adam update the parameters by torch's fused kernel: one pass over the tables, not eight.

    This saves a fifth of an epoch's time. The formula is the same, but rounds differently, so a run
    that must be bitwise equal to plain RecBole does not use it.
    """
    if type(optimizer) is torch.optim.Adam:
        for group in optimizer.param_groups:
            if all(
                p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in group["params"]
            ):
                group.update(fused=True, foreach=False)


class OwnGroups:
    """The first groups of an optimizer, which are the model's own: those that a checkpoint holds.

    Args:
        optimizer: the optimizer.
        n: how many groups.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, n: int) -> None:
        self._optimizer, self._n = optimizer, n

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state of these groups and their parameters."""
        content = self._optimizer.state_dict()
        groups = content["param_groups"][: self._n]
        own = {index for group in groups for index in group["params"]}
        state = {index: value for index, value in content["state"].items() if index in own}
        return {"state": state, "param_groups": groups}
