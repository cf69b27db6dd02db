"""Calling the scoring methods of a RecBole model, without leaving anything changed in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_rcekd.compat.habits import EVALUATION_CACHES
from recbole_rcekd.core.errors import ScoringError
from recbole_rcekd.models.product_recorder import Enough, ProductRecorder


class ModelCalls:
    """The scoring methods of one RecBole model.

    Args:
        model: a RecBole model.
        dataset: the dataset it was built for; it has the names of the id fields and the number of
            items.

    Attributes:
        model: the model.
        name: the name of the model's class.
        n_items: how many items there are, padding included.
        device: the device of the model.
    """

    def __init__(self, model: Any, dataset: Any) -> None:
        self.model = model
        self.name = type(model).__name__
        self.n_items = int(dataset.item_num)
        self.device: torch.device = model.device
        self._item_features = _item_features(dataset)
        self._inside = False

    def full_sort(self, inputs: Interaction, n: int) -> Tensor:
        """``full_sort_predict``: scores of every item for the ``n`` rows of ``inputs``."""
        with self.fresh_caches():
            scores: Tensor = self.model.full_sort_predict(inputs)
        return scores.view(n, -1)

    def predict(self, inputs: Interaction, items: Tensor) -> Tensor:
        """``predict`` for each pair of one of the n rows of ``inputs`` and its ``items [n, T]``."""
        pairs = inputs.repeat_interleave(items.shape[1])
        pairs.update(self._item_features(items.reshape(-1)))
        with self.fresh_caches():
            scores: Tensor = self.model.predict(pairs)
        return scores.view(items.shape)

    def operands(self, inputs: Interaction, n: int, index: int) -> tuple[Tensor, Tensor]:
        """The two operands of one product of user rows and an item table.

        The product itself is not computed.

        Args:
            inputs: n rows.
            n: the number of rows.
            index: which of the products in ``full_sort_predict``, counted from 1.

        Returns:
            The rows ``[n, d]`` and the item table ``[n_items, d]``.

        Raises:
            ScoringError: there are fewer products than ``index``.
        """
        recorder = ProductRecorder(n, self.n_items, stop_at=index)
        with self.fresh_caches():
            try:
                with recorder:
                    self.model.full_sort_predict(inputs)
            except Enough:
                pass
        if len(recorder.products) < index:
            raise ScoringError(
                f"{self.name} no longer ends in a product of two tables; please report this model."
            )
        rows, table, _ = recorder.products[index - 1]
        return rows, table

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """While this lasts: evaluation mode, no gradient, and no caches from before or after."""
        was_training = self.model.training
        self._set_training(False)
        try:
            with torch.no_grad(), self.fresh_caches():
                yield
        finally:
            self._set_training(was_training)

    @contextmanager
    def training_without_trace(self) -> Iterator[None]:
        """While this lasts: training mode, except for batch normalisation (as in DIN).

        Batch normalisation stays in evaluation mode, so that its running statistics do not change.
        """
        was_training = self.model.training
        self._set_training(True)
        for module in self.model.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        try:
            with torch.enable_grad():
                yield
        finally:
            self._set_training(was_training)

    @contextmanager
    def fresh_caches(self) -> Iterator[None]:
        """Clear the model's caches before and after; within :meth:`evaluating` calls share them."""
        if self._inside:
            yield
            return
        caches = [name for name in EVALUATION_CACHES if name in vars(self.model)]
        self._inside = True
        try:
            for name in caches:
                setattr(self.model, name, None)
            yield
        finally:
            self._inside = False
            for name in caches:
                setattr(self.model, name, None)

    def _set_training(self, mode: bool) -> None:
        """``torch.nn.Module.train``, not the model's own: SGL's ``train`` draws new graphs."""
        torch.nn.Module.train(self.model, mode)


def _item_features(dataset: Any) -> Callable[[Tensor], Interaction]:
    """A function from item ids to the model's input: the ids, and features if the data have any."""
    if getattr(dataset, "item_feat", None) is not None:
        features = dataset.get_item_feature()
        return lambda items: features[items.to(features[dataset.iid_field].device)].to(items.device)
    return lambda items: Interaction({dataset.iid_field: items.long()})
