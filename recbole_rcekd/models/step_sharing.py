"""Results that the base loss and the KD loss of a training step share, to be computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from recbole_rcekd.compat.instances import forward_replaced


class StepMemory:
    """Keeps the results of a model's ``forward`` within one step.

    * Graph models call ``forward()`` without arguments, or only with sparse matrices, wherever they
      need propagated embeddings. Within a step the result is the same.
    * The KD loss of a sequential student needs the batch that the base loss was computed on. If it
      calls ``forward`` with the same tensors while :meth:`replaying`, it gets the result of the
      base loss. (The base loss does not: FEARec, for example, calls ``forward`` twice for two draws
      of dropout.)

    Args:
        of_rows: the student learns rows of sequences, so the results of calls with arguments are
            kept too.
    """

    def __init__(self, of_rows: bool) -> None:
        self._of_rows = of_rows
        self._replays = False
        self._answers: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def clear(self) -> None:
        """Forget all results; called when a step begins and when it ends."""
        self._answers.clear()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """While this lasts, calls with the same tensors get the same result."""
        self._replays = True
        try:
            yield
        finally:
            self._replays = False

    @contextmanager
    def sharing(self, model: Any) -> Iterator[None]:
        """While this lasts, ``model.forward`` returns kept results where that is correct."""
        with forward_replaced(model, self._remembering):
            yield

    def _remembering(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            named = (*args, *(part for name in sorted(kwargs) for part in (name, kwargs[name])))
            key = tuple(id(x) if isinstance(x, Tensor) else x for x in named)
            propagation = not kwargs and all(
                isinstance(arg, Tensor) and arg.is_sparse for arg in args
            )
            if key in self._answers and (propagation or self._replays):
                return self._answers[key][1]
            result = original(*args, **kwargs)
            if propagation or self._of_rows:
                # The arguments are kept too: as long as they exist, no other object has their ids.
                self._answers.setdefault(key, ((args, kwargs), result))
            return result

        return forward


@contextmanager
def dense_in_the_end(tables: tuple[Tensor, Tensor]) -> Iterator[None]:
    """While this lasts, sparse gradients of two tables become dense when they are complete.

    They are added to the dense gradient of the base loss. Without a gradient of the base loss, the
    sparse gradient is converted. So the optimizer always gets dense gradients, as in RecBole.
    """
    hooks = [
        table.register_post_accumulate_grad_hook(_make_dense)  # type: ignore[no-untyped-call]
        for table in tables
        if table.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _make_dense(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()
