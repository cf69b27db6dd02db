"""Finds out how a model computes its scores: as a product of two tables, as rows, or as pairs.

The model is run once on a few users (or sequences). So no list of models is needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from recbole.utils import ModelType
from torch import Tensor

from recbole_rcekd.core.errors import ScoringError
from recbole_rcekd.data.contexts import Contexts, Users
from recbole_rcekd.models.model_calls import ModelCalls
from recbole_rcekd.models.product_recorder import ProductRecorder, same_memory

Kind = Literal["product", "rows", "pairs"]

_RANKABLE = (
    ModelType.GENERAL,
    ModelType.KNOWLEDGE,
    ModelType.TRADITIONAL,
    ModelType.SEQUENTIAL,
    ModelType.CONTEXT,
)


def require_rankable(model_class: Any) -> None:
    """Refuse a model that is no torch model.

    Raises:
        ScoringError: the model is of another type; the message names both.
    """
    model_type = getattr(model_class, "type", None)
    if model_type not in _RANKABLE:
        raise ScoringError(
            f"{model_class.__name__} is a {getattr(model_type, 'name', model_type)} model, which "
            "RecBole trains and scores outside of torch: it can neither teach nor learn here. "
            "Choose a general, sequential, knowledge-aware or context-aware model."
        )


@dataclass(frozen=True)
class ScoreForm:
    """How a model computes its scores.

    Args:
        kind: ``product`` (of two tables), ``rows`` (the scores of all items at once) or ``pairs``
            (one user and one item each).
        index: which product in ``full_sort_predict`` the scores are, counted from 1.
        scale_and_bias: the scores are ``scale · product + bias [n_items]`` (BERT4Rec's bias, CORE's
            temperature). Only for a frozen model, since both may change in training.
    """

    kind: Kind
    index: int = 0
    scale_and_bias: tuple[float, Tensor] | None = None

    def operands(self, calls: ModelCalls, inputs: Any, n: int) -> tuple[Tensor, Tensor]:
        """The user rows ``[n, d]`` and item table ``[n_items, d]`` whose product is the scores."""
        rows, table = calls.operands(inputs, n, self.index)
        if self.scale_and_bias is not None:
            scale, bias = self.scale_and_bias
            rows = torch.cat([scale * rows, torch.ones_like(rows[:, :1])], dim=1)
            table = torch.cat([table, bias.unsqueeze(1)], dim=1)
        return rows, table


def find_form(calls: ModelCalls, contexts: Contexts, frozen: bool) -> ScoreForm:
    """Find out how a model computes its scores in evaluation mode.

    Args:
        calls: the model.
        contexts: the users (or rows of sequences) that it scores.
        frozen: the model will not change any more, so a scale and a bias are constants.

    Raises:
        ScoringError: ``full_sort_predict`` returns scores of an unexpected shape, or the operands
            do not give the scores.
    """
    probe = torch.arange(1, min(4, contexts.n), device=calls.device)
    inputs, n = contexts.inputs(probe), len(probe)
    recorder = ProductRecorder(n, calls.n_items)
    try:
        with recorder:
            own = calls.full_sort(inputs, n)
    except NotImplementedError:
        return ScoreForm("pairs")
    if own.shape != (n, calls.n_items):
        raise ScoringError(
            f"{calls.name}.full_sort_predict gave {tuple(own.shape)} scores for {n} users (or "
            f"sequences) and {calls.n_items} items."
        )
    if not recorder.products:
        return ScoreForm("rows")
    index = len(recorder.products)
    rows, table, result = recorder.products[-1]
    # The scores must be the product itself: a bias, for example, may be zero now and not later.
    if result is None or result.data_ptr() != own.data_ptr():
        found = _scale_and_bias(rows @ table.t(), own) if frozen else None
        if found is None:
            return ScoreForm("rows")
        form = ScoreForm("product", index, found)
        return form if _holds(calls, contexts, form) else ScoreForm("rows")
    if not torch.allclose(rows @ table.t(), own, rtol=1e-4, atol=1e-5, equal_nan=True):
        return ScoreForm("rows")
    # A check at the start: the scores that training will use are the model's own.
    form = ScoreForm("product", index)
    rows, table = form.operands(calls, contexts.inputs(probe), n)
    if not torch.allclose(rows @ table.t(), own, rtol=1e-4, atol=1e-5, equal_nan=True):
        raise ScoringError(
            f"{calls.name}: the scores used for distillation differ from full_sort_predict."
        )
    return form


def _scale_and_bias(product: Tensor, own: Tensor) -> tuple[float, Tensor] | None:
    """The scale and the bias by which ``own`` differs from ``product``, from a few rows."""
    if len(product) < 2:
        return None
    product, own = product.double(), own.double()
    between, between_own = product - product.mean(0), own - own.mean(0)
    scale = float((between * between_own).sum() / between.square().sum())
    if scale == 0.0 or not math.isfinite(scale):
        return None
    return scale, (own - scale * product).mean(0).to(dtype=torch.float32)


def _holds(calls: ModelCalls, contexts: Contexts, form: ScoreForm) -> bool:
    """Whether a form gives the model's own scores for some more users too."""
    more = torch.arange(1, min(17, contexts.n), device=calls.device)
    rows, table = form.operands(calls, contexts.inputs(more), len(more))
    own = calls.full_sort(contexts.inputs(more), len(more))
    return torch.allclose(rows @ table.t(), own, rtol=1e-4, atol=1e-4)


def find_tables(
    calls: ModelCalls, contexts: Contexts, form: ScoreForm
) -> tuple[Tensor, Tensor] | None:
    """The two tables of a model that consists of nothing else (BPR), if it is such a model.

    Its scores can be computed from the tables without running the model. This is read from the
    graph of the gradient in training mode: the item operand must be a parameter, and the user
    operand a lookup in another parameter; only transpositions may come between. The graph does not
    show which rows are looked up, nor whether evaluation differs, so the values are compared for
    all users.

    Args:
        calls: the model.
        contexts: the users (or rows of sequences) that it scores.
        form: how the model computes its scores.

    Returns:
        The user table and the item table, or ``None``.
    """
    if form.kind != "product" or form.scale_and_bias is not None:
        return None
    if not isinstance(contexts, Users):
        return None
    probe = torch.arange(1, min(3, contexts.n), device=calls.device)
    with calls.training_without_trace():
        rows, item_table = form.operands(calls, contexts.inputs(probe), len(probe))
    lookup = rows.grad_fn
    if lookup is None or lookup.name() != "EmbeddingBackward0":
        return None
    users = _parameter_behind(lookup.next_functions[0][0])
    items = _parameter_behind(item_table.grad_fn)
    if users is None or items is None or len(users) != contexts.n:
        return None
    if not same_memory(items, item_table) or not _is_plain(lookup):
        return None
    version = users._version
    everyone = torch.arange(contexts.n, device=calls.device)
    with calls.evaluating():
        rows, item_table = form.operands(calls, contexts.inputs(everyone), len(everyone))
    # A lookup with a largest norm (``max_norm``) changes its table.
    unchanged = users._version == version and torch.equal(rows, users)
    return (users, items) if unchanged and same_memory(items, item_table) else None


def _parameter_behind(node: Any) -> Tensor | None:
    """The parameter whose gradient, possibly transposed, ``node`` of the graph computes."""
    transposed = ("TBackward0", "TransposeBackward0", "PermuteBackward0")
    while node is not None and node.name() in transposed:
        node = node.next_functions[0][0]
    parameter: Tensor | None = getattr(node, "variable", None)
    return parameter


def _is_plain(lookup: Any) -> bool:
    """Whether the gradient of a lookup is a plain sum for every id except 0.

    That means: no other padding, and no scaling by frequency.
    """
    padding = lookup._saved_padding_idx
    no_padding = padding in (-1, 2**64 - 1)
    return (no_padding or padding == 0) and not lookup._saved_scale_grad_by_freq
