"""The scores of a RecBole model for given users and items, with a gradient in training.

RecBole's models compute scores in three ways (:mod:`recbole_rcekd.models.probe` finds out which):

* ``product``: ``full_sort_predict`` ends in a product of user rows and an item table. The two
  operands are recorded, so that scores of a few items are a few dot products, not a full row.
* ``rows``: any other ``full_sort_predict``. A full row is computed, and the wanted scores are taken
  from it.
* ``pairs``: the model has no ``full_sort_predict``. ``predict`` is called for each pair of a user
  and an item.

RecBole evaluates with ``full_sort_predict``, so its scores are used here too. (In FISM and CORE,
``predict`` gives other scores.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_rcekd.core.errors import ScoringError
from recbole_rcekd.core.products import picked_products
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.top_k import ProductRanking, Ranking, RowRanking
from recbole_rcekd.data.contexts import Contexts, Users, of_training
from recbole_rcekd.models.batch_scores import BatchScores, DenseBatchScores, FactoredBatchScores
from recbole_rcekd.models.model_calls import ModelCalls
from recbole_rcekd.models.probe import Kind, find_form, find_tables, require_rankable
from recbole_rcekd.models.product_recorder import Product, ProductRecorder, same_memory
from recbole_rcekd.models.step_sharing import StepMemory, dense_in_the_end


class ModelScorer:
    """The scores of a RecBole model, with a gradient in training mode.

    Args:
        model: a RecBole model.
        dataset: the dataset it was built for; it has the names of the id fields and the number of
            items.
        trainable: refuse a model whose scores have no gradient.
        contexts: the users (or rows of sequences) that the model scores; default: those of the
            training data (:func:`~recbole_rcekd.data.contexts.of_training`).
        frozen: the model will not change any more, so a bias or a scale of its products is found
            out once.

    Raises:
        ScoringError: the model is of a type that cannot be scored; or it has no gradient, although
            ``trainable`` is set; or the operands of its product do not give its scores.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        trainable: bool = False,
        contexts: Contexts | None = None,
        frozen: bool = False,
    ) -> None:
        require_rankable(type(model))
        self.model = model
        self.contexts = of_training(dataset) if contexts is None else contexts
        self._calls = ModelCalls(model, dataset)
        self._memory = StepMemory(of_rows=not self.scores_users)
        self._tables: tuple[Tensor, Tensor] | None = None
        self._sparse_gradients = False
        # Random draws here (by MacridVAE or dropout, for example) must not shift RecBole's random
        # stream.
        with preserved_random_state():
            with self.evaluating():
                self._form = find_form(self._calls, self.contexts, frozen)
            self._tables = find_tables(self._calls, self.contexts, self._form)
            if trainable:
                self._require_gradient()

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return self._calls.name

    @property
    def kind(self) -> Kind:
        """How the scores are computed: ``product``, ``rows`` or ``pairs``."""
        return self._form.kind

    @property
    def n_contexts(self) -> int:
        """How many users (or rows of sequences) there are, padding included."""
        return self.contexts.n

    @property
    def n_items(self) -> int:
        """How many items there are, padding included."""
        return self._calls.n_items

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._calls.device

    @property
    def scores_users(self) -> bool:
        """Whether the model scores users, not sequences."""
        return isinstance(self.contexts, Users)

    # -- scores ------------------------------------------------------------------------------------

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """Scores ``[n, T]`` of ``items [n, T]`` for the users (or rows) ``contexts [n]``."""
        items = items.long()
        if self.kind == "product":
            return picked_products(*self.operands(contexts), items, self._sparse_gradients)
        if self.kind == "rows":
            return self._full_sort(contexts).gather(1, items)
        return self._calls.predict(self.contexts.inputs(contexts), items)

    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores ``[n, n_items]`` of all items; −inf at the padding item."""
        if self.kind == "product":
            rows, table = self.operands(contexts)
            scores = rows @ table.t()
            if not scores.requires_grad:
                scores[:, 0] = -torch.inf  # in place: a pass over memory less for top-K lists
                return scores
        elif self.kind == "rows":
            scores = self._full_sort(contexts)
        else:
            items = torch.arange(self.n_items, device=contexts.device).expand(len(contexts), -1)
            scores = self.score(contexts, items)
        padding = torch.zeros(self.n_items, dtype=torch.bool, device=scores.device)
        padding[0] = True
        return scores.masked_fill(padding, -torch.inf)

    def ranking(self) -> Ranking:
        """The ranking by the model's weights as they are now."""
        if self.kind != "product":
            return RowRanking(self.score_all, self.n_items)
        _, table = self.operands(torch.ones(1, dtype=torch.int64, device=self.device))
        return ProductRanking(lambda contexts: self.operands(contexts)[0], table)

    def score_by_item(self, items: Tensor, users: Tensor) -> Tensor:
        """Scores ``[n, T]`` of the items ``items [n]`` for the users ``users [n, T]``."""
        distinct, position = torch.unique(users.long(), return_inverse=True)
        wanted = items.long().unsqueeze(1).expand_as(users)
        if self.kind == "product":
            rows, table = self.operands(distinct)
            return (rows[position] * table[items.long()].unsqueeze(1)).sum(-1)
        if self.kind == "rows":
            return self._full_sort(distinct)[position, wanted]
        inputs = self.contexts.inputs(users.reshape(-1))
        return self._calls.predict(inputs, wanted.reshape(-1, 1)).view_as(users)

    def operands(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """User rows ``[n, d]`` and item table ``[n_items, d]`` of a ``product`` model.

        Both have gradients.
        """
        if self._tables is not None:
            user_table, item_table = self._tables
            rows = torch.nn.functional.embedding(
                contexts.long(), user_table, sparse=self._sparse_gradients
            )
            return rows, item_table
        return self._form.operands(self._calls, self.contexts.inputs(contexts), len(contexts))

    def vectors(self, contexts: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``[n, d]`` of users and ``[m, d]`` of items of a ``product`` model.

        Both have gradients.
        """
        rows, table = self.operands(contexts)
        picked = torch.nn.functional.embedding(items.long(), table, sparse=self._sparse_gradients)
        return rows, picked

    def _full_sort(self, contexts: Tensor) -> Tensor:
        return self._calls.full_sort(self.contexts.inputs(contexts), len(contexts))

    # -- of a batch in training --------------------------------------------------------------------

    def score_batch(self, batch: Interaction, known: list[Product]) -> BatchScores:
        """The scores of the rows of a training batch.

        Args:
            batch: rows as RecBole's loader gives them.
            known: products recorded while the base loss was computed (:meth:`recording_products`).
        """
        n = len(batch)
        if self.kind == "pairs":
            everything = torch.arange(self.n_items, device=self.device).expand(n, -1)
            return DenseBatchScores(self._calls.predict(batch, everything))
        with self._memory.replaying():
            if self.kind == "rows":
                return DenseBatchScores(self._calls.full_sort(batch, n))
            rows, table = self._form.operands(self._calls, batch, n)
        for left, right, product in known:
            if product is not None and same_memory(left, rows) and same_memory(right, table):
                return FactoredBatchScores(rows, table, product)
        return FactoredBatchScores(rows, table)

    @contextmanager
    def recording_products(self, batch: Interaction) -> Iterator[list[Product]]:
        """Record the products of a batch's rows and an item table while this lasts.

        The base loss computes one with ``loss_type: CE``, which scores the whole catalogue.
        """
        with ProductRecorder(len(batch), self.n_items) as recorder:
            yield recorder.products

    @contextmanager
    def shared_forward(self) -> Iterator[Callable[[], None]]:
        """While this lasts, base loss and KD loss share the model's results within a step.

        Yields:
            The function to call at the end of a step. It clears the
            :class:`~recbole_rcekd.models.step_sharing.StepMemory`.
        """
        with self._memory.sharing(self.model):
            yield self._memory.clear

    @contextmanager
    def sparse_gradients(self) -> Iterator[None]:
        """While this lasts, the gradients of the KD loss are sparse.

        So a step only touches the rows of the tables that it learns on. This holds on a CPU, for
        models that consist of two tables; for others nothing changes.
        """
        if self._tables is None or self.device.type != "cpu":
            yield
            return
        self._sparse_gradients = True
        try:
            with dense_in_the_end(self._tables):
                yield
        finally:
            self._sparse_gradients = False

    def evaluating(self) -> AbstractContextManager[None]:
        """While this lasts: evaluation mode, without gradient.

        Top-K lists and a teacher's scores are computed in this mode.
        """
        return self._calls.evaluating()

    def _require_gradient(self) -> None:
        with self._calls.training_without_trace():
            probe = torch.arange(1, min(3, self.n_contexts), device=self.device)
            one = torch.ones((len(probe), 1), dtype=torch.int64, device=self.device)
            scores = self.score(probe, one)
        if not scores.requires_grad:
            raise ScoringError(
                f"{self.name} has no gradient through its scores, so it cannot be a student (it "
                "can be a teacher)."
            )
