"""Watching a model compute products of contexts and an item table, without a line about the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# (left operand, right one transposed, result; None of a product that was stopped at).
Product = tuple[Tensor, Tensor, Tensor | None]

_PRODUCTS = {
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.Tensor.mm,
    torch.nn.functional.linear,
}


class Enough(Exception):
    """Both operands are known: the product itself need not be computed."""


class ProductRecorder(TorchFunctionMode):
    """Watches for products ``[n_contexts, d] × [d, n_items]``.

    Args:
        n_contexts: rows of the left operand.
        n_items: columns of the right one.
        stop_at: when so many were met, stop with :class:`Enough` before the last one is computed.

    Attributes:
        products: (left, right transposed, result) of each, in order; of the one stopped at without
            a result.
    """

    def __init__(self, n_contexts: int, n_items: int, stop_at: int | None = None) -> None:
        super().__init__()
        self.shape = (n_contexts, n_items)
        self.stop_at = stop_at
        self.products: list[Product] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch instead of each of its functions."""
        if func in _PRODUCTS and len(args) >= 2 and not kwargs:
            left, right = args[0], args[1]
            if func is torch.nn.functional.linear:
                right = right.t()
            # What a bias adds would be missing from the operands.
            biased = len(args) > 2 and args[2] is not None
            if (
                not biased
                and left.dim() == right.dim() == 2
                and (left.shape[0], right.shape[1]) == self.shape
            ):
                if len(self.products) + 1 == self.stop_at:
                    self.products.append((left, right.t(), None))
                    raise Enough
                result = func(left, args[1])
                self.products.append((left, right.t(), result))
                return result
        return func(*args, **(kwargs or {}))


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether these are the same numbers in the same places: a square table and its transpose are not."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
