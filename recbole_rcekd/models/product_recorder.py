"""Records the products of user rows and an item table that a model computes, for any model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# (left operand, transposed right operand, result). The result is None for a product that was not
# computed, because the recorder stopped there.
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
    """Stops a model: both operands are known, and the product itself is not needed."""


class ProductRecorder(TorchFunctionMode):
    """Records products of the shape ``[n_contexts, d] × [d, n_items]``.

    Args:
        n_contexts: rows of the left operand: users, or rows of sequences.
        n_items: columns of the right operand.
        stop_at: stop with :class:`Enough` at this product, counted from 1, before it is computed;
            ``None``: do not stop.

    Attributes:
        products: (left operand, transposed right operand, result) of each product, in order; the
            result is ``None`` for the product at which the recorder stopped.
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
            # The operands alone would lack the bias.
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
    """Whether two tensors share their memory, in the same layout.

    A square table and its transpose do not.
    """
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
