"""The one adapter from a RecBole model to "scores of these items for these users".

RecBole's models answer in three ways, and :class:`ModelScorer` finds out which by running the model
once:

* ``product``: ``full_sort_predict`` ends in a product of user rows and an item table. The two
  operands are taken out of it, so that a few items cost a few dot products and not a full row. No
  model is named anywhere for this.
* ``rows``: any other ``full_sort_predict``; a full row, then the wanted cells.
* ``pairs``: no ``full_sort_predict``; one ``predict`` per cell.

Evaluation uses the full sort, so it is what is learned too (``predict`` differs from it in FISM and
CORE).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from recbole.data.interaction import Interaction
from recbole.utils import ModelType
from torch import Tensor

from recbole_rcekd.core.errors import ScoringError
from recbole_rcekd.core.functional import picked_products
from recbole_rcekd.core.random_state import preserved_random_state
from recbole_rcekd.core.top_k import ProductRanking, Ranking, RowRanking
from recbole_rcekd.data.contexts import Contexts, Users, of_training
from recbole_rcekd.models.batch_scores import BatchScores, DenseBatchScores, FactoredBatchScores
from recbole_rcekd.models.product_recorder import Enough, Product, ProductRecorder, same_memory

Kind = Literal["product", "rows", "pairs"]

# What evaluation leaves behind in LightGCN, NGCF, DGCF, SGL, NCL, SpectralCF and DMF. Left over
# from a scoring call, the next validation would rank with embeddings from before the training step.
EVALUATION_CACHES = ("restore_user_e", "restore_item_e", "i_embedding")

_RANKABLE = (
    ModelType.GENERAL,
    ModelType.KNOWLEDGE,
    ModelType.TRADITIONAL,
    ModelType.SEQUENTIAL,
    ModelType.CONTEXT,
)


def require_rankable(model_class: Any) -> None:
    """Refuse models that are no torch models.

    Raises:
        ScoringError: names the model and its type.
    """
    model_type = getattr(model_class, "type", None)
    if model_type not in _RANKABLE:
        raise ScoringError(
            f"{model_class.__name__} is a {getattr(model_type, 'name', model_type)} model, which "
            "RecBole trains and scores outside of torch: it can neither teach nor learn here. "
            "Choose a general, sequential, knowledge-aware or context-aware model."
        )


def _item_features(dataset: Any) -> Callable[[Tensor], Interaction]:
    """Item ids → what the model reads of an item: the id and, in datasets with features, those."""
    if getattr(dataset, "item_feat", None) is not None:
        features = dataset.get_item_feature()
        return lambda items: features[items.to(features[dataset.iid_field].device)].to(items.device)
    return lambda items: Interaction({dataset.iid_field: items.long()})


def _parameter_behind(node: Any) -> Tensor | None:
    """The parameter whose (transposed) gradient ``node`` of the graph computes."""
    while node is not None and node.name() in (
        "TBackward0",
        "TransposeBackward0",
        "PermuteBackward0",
    ):
        node = node.next_functions[0][0]
    parameter: Tensor | None = getattr(node, "variable", None)
    return parameter


def _make_dense(parameter: Tensor) -> None:
    if parameter.grad is not None and parameter.grad.is_sparse:
        parameter.grad = parameter.grad.to_dense()


def _is_plain(lookup: Any) -> bool:
    """Whether the gradient of a lookup is a plain sum for every id but 0 (no other padding, no scaling by frequency)."""
    padding = lookup._saved_padding_idx
    no_padding = padding in (-1, 2**64 - 1)
    return (no_padding or padding == 0) and not lookup._saved_scale_grad_by_freq


class ModelScorer:
    """Scores of any cells of a RecBole model, with a gradient in training mode.

    Args:
        model: a RecBole model.
        dataset: the dataset it was built for; names the id fields and the number of items.
        trainable: refuse a model whose scores have no gradient.
        contexts: who is scored; default: what a student learns on
            (:func:`~recbole_rcekd.data.contexts.of_training`).
        frozen: the model will not change any more: what is added to its products, or scales them,
            is read off once.

    Attributes:
        kind: ``product``, ``rows`` or ``pairs``.

    Raises:
        ScoringError: the model is of a type that cannot be scored, has no gradient though
            ``trainable``, or the fast way gives other numbers than the model's own.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        trainable: bool = False,
        contexts: Contexts | None = None,
        frozen: bool = False,
    ) -> None:
        self.model = model
        self.name = type(model).__name__
        self.contexts = of_training(dataset) if contexts is None else contexts
        self.n_contexts = self.contexts.n
        self.n_items = int(dataset.item_num)
        self.device: torch.device = model.device
        self._item_field = dataset.iid_field
        self._item_features = _item_features(dataset)
        self._frozen = frozen
        self._product_index = 0
        self._scale_and_bias: tuple[float, Tensor] | None = None
        self._inside = False
        self._replaying = False
        self._tables: tuple[Tensor, Tensor] | None = None
        self._sparse_gradients = False
        require_rankable(type(model))
        # What is drawn here (by MacridVAE or dropout, for example) must not shift the random stream
        # of plain RecBole.
        with preserved_random_state():
            with self.evaluating():
                self.kind: Kind = self._find_kind()
            self._tables = self._find_tables()
            if trainable:
                self._require_gradient()

    @property
    def scores_users(self) -> bool:
        """Whether contexts are users, and not sequences."""
        return isinstance(self.contexts, Users)

    def score(self, contexts: Tensor, items: Tensor) -> Tensor:
        """Scores of ``items [n, T]`` for ``contexts [n]``: ``[n, T]``."""
        items = items.long()
        if self.kind == "product":
            return picked_products(*self.operands(contexts), items, self._sparse_gradients)
        if self.kind == "rows":
            return self._full_sort(contexts).gather(1, items)
        return self._predict(self.contexts.inputs(contexts), items)

    def score_all(self, contexts: Tensor) -> Tensor:
        """Scores of every item, ``[n, n_items]``; −inf at the padding item."""
        if self.kind == "product":
            rows, table = self.operands(contexts)
            scores = rows @ table.t()
            if not scores.requires_grad:
                scores[:, 0] = -torch.inf  # saves a pass over memory while lists are made
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
        """Ranks with the weights as they are now."""
        if self.kind != "product":
            return RowRanking(self.score_all, self.n_items)
        _, table = self.operands(torch.ones(1, dtype=torch.int64, device=self.device))
        return ProductRanking(lambda contexts: self.operands(contexts)[0], table)

    def score_by_item(self, items: Tensor, users: Tensor) -> Tensor:
        """Scores seen from the item side: of ``users [n, T]`` for ``items [n]``, ``[n, T]``."""
        distinct, place = torch.unique(users.long(), return_inverse=True)
        wanted = items.long().unsqueeze(1).expand_as(users)
        if self.kind == "product":
            rows, table = self.operands(distinct)
            return (rows[place] * table[items.long()].unsqueeze(1)).sum(-1)
        if self.kind == "rows":
            return self._full_sort(distinct)[place, wanted]
        flat = self._predict(self.contexts.inputs(users.reshape(-1)), wanted.reshape(-1, 1))
        return flat.view_as(users)

    def operands(self, contexts: Tensor) -> tuple[Tensor, Tensor]:
        """User rows ``[n, d]`` and item table ``[n_items, d]`` of a ``product`` model, with their gradients."""
        if self._tables is not None:
            user_table, item_table = self._tables
            rows = torch.nn.functional.embedding(
                contexts.long(), user_table, sparse=self._sparse_gradients
            )
            return rows, item_table
        return self._operands_of(self.contexts.inputs(contexts), len(contexts))

    def vectors(self, contexts: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``[n, d]`` of contexts and ``[m, d]`` of items of a ``product`` model, with their gradients."""
        rows, table = self.operands(contexts)
        return rows, torch.nn.functional.embedding(
            items.long(), table, sparse=self._sparse_gradients
        )

    def _operands_of(self, inputs: Interaction, n: int) -> tuple[Tensor, Tensor]:
        recorder = ProductRecorder(n, self.n_items, stop_at=self._product_index)
        with self._fresh_caches():
            try:
                with recorder:
                    self.model.full_sort_predict(inputs)
            except Enough:
                pass
        if len(recorder.products) < self._product_index:
            raise ScoringError(
                f"{self.name} no longer ends in a product of two tables; please report this model."
            )
        rows, table, _ = recorder.products[self._product_index - 1]
        if self._scale_and_bias is not None:
            scale, bias = self._scale_and_bias
            rows = torch.cat([scale * rows, torch.ones_like(rows[:, :1])], dim=1)
            table = torch.cat([table, bias.unsqueeze(1)], dim=1)
        return rows, table

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, no gradient, no leftovers: how lists are made and the teacher is asked."""
        was_training = self.model.training
        self._set_training(False)
        try:
            with torch.no_grad(), self._fresh_caches():
                yield
        finally:
            self._set_training(was_training)

    @contextmanager
    def sparse_gradients(self) -> Iterator[None]:
        """While this lasts, the KD term touches only its own rows of plain tables, not whole tables.

        Its gradient is sparse and is added to the dense one of the base loss, so that optimizers
        meet dense gradients as ever; where there is no other, it is made dense. On a processor, for
        models that are two plain tables.
        """
        if self._tables is None or self.device.type != "cpu":
            yield
            return
        hooks = [
            table.register_post_accumulate_grad_hook(_make_dense)  # type: ignore[no-untyped-call]
            for table in self._tables
            if table.requires_grad
        ]
        self._sparse_gradients = True
        try:
            yield
        finally:
            self._sparse_gradients = False
            for hook in hooks:
                hook.remove()

    @contextmanager
    def shared_forward(self) -> Iterator[Callable[[], None]]:
        """Let the base loss and the KD loss of one step share what they both need. Yields the function that ends a step.

        * Graph models call ``forward()`` with no argument, or with nothing but sparse matrices,
          wherever they need propagated embeddings; within a step the answer is the same.
        * :meth:`score_batch` asks about the very batch that the base loss was computed on: where it
          calls ``forward`` with the same tensors, it is given what the base loss got. (The base
          loss itself is not: FEARec, for example, calls it twice for two draws of dropout.)
        """
        original = self.model.forward
        memory: dict[tuple[Any, ...], tuple[Any, Any]] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            named = (*args, *(part for name in sorted(kwargs) for part in (name, kwargs[name])))
            key = tuple(id(x) if isinstance(x, Tensor) else x for x in named)
            propagation = not kwargs and all(
                isinstance(arg, Tensor) and arg.is_sparse for arg in args
            )
            if key in memory and (propagation or self._replaying):
                return memory[key][1]
            result = original(*args, **kwargs)
            if propagation or not isinstance(self.contexts, Users):
                memory.setdefault(
                    key, ((args, kwargs), result)
                )  # what is alive keeps its id to itself
            return result

        self.model.forward = forward
        try:
            yield memory.clear
        finally:
            del self.model.forward

    @contextmanager
    def recording_products(self, batch: Interaction) -> Iterator[list[Product]]:
        """The products of a batch's rows and an item table that are computed inside: CE scores the whole catalogue."""
        with ProductRecorder(len(batch), self.n_items) as recorder:
            yield recorder.products

    def score_batch(self, batch: Interaction, known: list[Product]) -> BatchScores:
        """What the model says of the rows of a training batch.

        Args:
            batch: rows as RecBole's loader gives them.
            known: products met while the base loss was computed (:meth:`recording_products`).
        """
        n = len(batch)
        if self.kind == "pairs":
            return DenseBatchScores(
                self._predict(batch, torch.arange(self.n_items, device=self.device).expand(n, -1))
            )
        self._replaying = True
        try:
            if self.kind == "rows":
                return DenseBatchScores(self._full_sort_of(batch, n))
            rows, table = self._operands_of(batch, n)
        finally:
            self._replaying = False
        for left, right, product in known:
            if product is not None and same_memory(left, rows) and same_memory(right, table):
                return FactoredBatchScores(rows, table, product)
        return FactoredBatchScores(rows, table)

    @contextmanager
    def _fresh_caches(self) -> Iterator[None]:
        """Clear what evaluation keeps, before and after; blocks of one evaluation share it in between."""
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
        """As ``model.train(mode)``, without what a model does besides: SGL draws new graphs."""
        torch.nn.Module.train(self.model, mode)

    def _full_sort(self, contexts: Tensor) -> Tensor:
        return self._full_sort_of(self.contexts.inputs(contexts), len(contexts))

    def _full_sort_of(self, inputs: Interaction, n: int) -> Tensor:
        with self._fresh_caches():
            scores: Tensor = self.model.full_sort_predict(inputs)
        return scores.view(n, -1)

    def _predict(self, inputs: Interaction, items: Tensor) -> Tensor:
        """``predict`` of ``items [n, T]`` for the n rows of ``inputs``, one pair each."""
        pairs = inputs.repeat_interleave(items.shape[1])
        pairs.update(self._item_features(items.reshape(-1)))
        with self._fresh_caches():
            scores: Tensor = self.model.predict(pairs)
        return scores.view(items.shape)

    def _find_kind(self) -> Kind:
        probe = torch.arange(1, min(4, self.n_contexts), device=self.device)
        recorder = ProductRecorder(len(probe), self.n_items)
        try:
            with recorder:
                own = self._full_sort(probe)
        except NotImplementedError:
            return "pairs"
        if own.shape != (len(probe), self.n_items):
            raise ScoringError(
                f"{self.name}.full_sort_predict gave {tuple(own.shape)} scores for {len(probe)} "
                f"contexts and {self.n_items} items."
            )
        if not recorder.products:
            return "rows"
        self._product_index = len(recorder.products)
        rows, table, result = recorder.products[-1]
        # The scores must be the product itself: a bias, for example, may be zero now and not later.
        if result is None or result.data_ptr() != own.data_ptr():
            return (
                "product"
                if self._frozen and self._find_scale_and_bias(probe, rows @ table.t(), own)
                else "rows"
            )
        if not torch.allclose(rows @ table.t(), own, rtol=1e-4, atol=1e-5, equal_nan=True):
            return "rows"
        # The start-up check: the way that training will take gives what the model itself says.
        self.kind = "product"
        items = torch.arange(self.n_items, device=self.device).expand(len(probe), -1)
        if not torch.allclose(self.score(probe, items), own, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ScoringError(
                f"{self.name}: the scores used for distillation differ from full_sort_predict."
            )
        return "product"

    def _find_scale_and_bias(self, probe: Tensor, product: Tensor, own: Tensor) -> bool:
        """Whether scores are ``scale · product + bias of the item`` (BERT4Rec's bias, CORE's temperature).

        Read off the first contexts, and checked on those and on some more.
        """
        if len(probe) < 2:
            return False
        product, own = product.double(), own.double()
        between, between_own = product - product.mean(0), own - own.mean(0)
        scale = float((between * between_own).sum() / between.square().sum())
        if scale == 0.0 or not math.isfinite(scale):
            return False
        self._scale_and_bias = (scale, (own - scale * product).mean(0).to(dtype=torch.float32))
        more = torch.arange(1, min(17, self.n_contexts), device=self.device)
        rows, table = self._operands_of(self.contexts.inputs(more), len(more))
        if torch.allclose(rows @ table.t(), self._full_sort(more), rtol=1e-4, atol=1e-4):
            return True
        self._scale_and_bias = None
        return False

    def _find_tables(self) -> tuple[Tensor, Tensor] | None:
        """The two tables of a model that is nothing but them (BPR), which can be asked without running the model.

        Read off the graph of the gradient in training mode: the item operand must be a parameter
        itself, and the user operand a lookup in another, with nothing in between but
        transpositions. What a graph does not show (which rows are looked up, evaluation that
        differs) is seen in the values for all users.
        """
        if (
            self.kind != "product"
            or self._scale_and_bias is not None
            or not isinstance(self.contexts, Users)
        ):
            return None
        probe = torch.arange(1, min(3, self.n_contexts), device=self.device)
        with self._probing():
            rows, item_table = self.operands(probe)
        lookup = rows.grad_fn
        if lookup is None or lookup.name() != "EmbeddingBackward0":
            return None
        users, items = (
            _parameter_behind(lookup.next_functions[0][0]),
            _parameter_behind(item_table.grad_fn),
        )
        if users is None or items is None or len(users) != self.n_contexts:
            return None
        if not same_memory(items, item_table) or not _is_plain(lookup):
            return None
        version = users._version
        everyone = torch.arange(self.n_contexts, device=self.device)
        with self.evaluating():
            rows, item_table = self.operands(everyone)
        # A lookup with a largest norm changes its table.
        if (
            users._version != version
            or not torch.equal(rows, users)
            or not same_memory(items, item_table)
        ):
            return None
        return users, items

    @contextmanager
    def _probing(self) -> Iterator[None]:
        """As in training, but batch normalisation, which DIN has, takes no note of what it sees."""
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

    def _require_gradient(self) -> None:
        with self._probing():
            probe = torch.arange(1, min(3, self.n_contexts), device=self.device)
            scores = self.score(
                probe, torch.ones((len(probe), 1), dtype=torch.int64, device=self.device)
            )
        if not scores.requires_grad:
            raise ScoringError(
                f"{self.name} has no gradient through its scores, so it cannot be a student (it "
                "can be a teacher)."
            )
