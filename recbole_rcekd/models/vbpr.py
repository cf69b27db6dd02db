"""VBPR: matrix factorisation with item features, which are vectors of texts or images.

He and McAuley, "VBPR: Visual Bayesian Personalized Ranking from Implicit Feedback", AAAI 2016.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.init import xavier_normal_initialization
from recbole.model.loss import BPRLoss
from recbole.utils import FeatureType, InputType
from torch import Tensor, nn

from recbole_rcekd.core.errors import SettingsError


class VBPR(GeneralRecommender):  # type: ignore[misc]
    """Matrix factorisation whose item factors and biases are partly computed from features.

    ``score(u, i) = γ_u · γ_i + θ_u · (E f_i) + β_i + β' · f_i`` (equations 4 and 7 of the paper).
    The paper's global offset and user bias are left out: they change neither a ranking nor the BPR
    loss.

    ``f_i`` is the concatenation of the item's vectors, one for each name in ``item_features``,
    prepared by :func:`prepare_features`. The prepared vectors are saved in the checkpoint, although
    they could be read again. So the scores of a teacher, and the key of their cache, depend on its
    checkpoint alone.

    Args:
        config: RecBole's Config; ``properties/model/VBPR.yaml`` documents the keys. Weight decay is
            RecBole's.
        dataset: RecBole's dataset, with the vectors preloaded.

    Raises:
        SettingsError: ``item_features`` names no vectors, or the vectors are not loaded, belong to
            no item id, or are not finite.
    """

    input_type = InputType.PAIRWISE

    features: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        size, feature_size = config["embedding_size"], config["feature_embedding_size"]
        self.user_embedding = nn.Embedding(self.n_users, size)  # γ_u
        self.item_embedding = nn.Embedding(self.n_items, size)  # γ_i
        self.user_taste = nn.Embedding(self.n_users, feature_size)  # θ_u
        self.item_bias = nn.Embedding(self.n_items, 1)  # β_i
        self.register_buffer("features", torch.from_numpy(_read_features(config, dataset)))  # f_i
        self.projection = nn.Linear(self.features.shape[1], feature_size, bias=False)  # E
        self.feature_bias = nn.Linear(self.features.shape[1], 1, bias=False)  # β'
        self.loss = BPRLoss()
        self.apply(xavier_normal_initialization)

    def user_rows(self, users: Tensor) -> Tensor:
        """``[γ_u, θ_u, 1]`` of ``users [n]``: ``[n, d]``."""
        gamma = self.user_embedding(users)
        return torch.cat((gamma, self.user_taste(users), gamma.new_ones(len(users), 1)), dim=1)

    def item_rows(self, items: Tensor | None = None) -> Tensor:
        """``[γ_i, E f_i, β_i + β' · f_i]`` of ``items [n]``, or of all items: ``[n, d]``."""
        if items is None:
            gamma, features, bias = self.item_embedding.weight, self.features, self.item_bias.weight
        else:
            gamma, features, bias = (
                self.item_embedding(items),
                self.features[items],
                self.item_bias(items),
            )
        return torch.cat(
            (gamma, self.projection(features), bias + self.feature_bias(features)), dim=1
        )

    def calculate_loss(self, interaction: Any) -> Tensor:
        """RecBole's BPR loss of a batch, ``−mean log σ(score(u, i) − score(u, j))``."""
        users = self.user_rows(interaction[self.USER_ID])
        # Features are long, and a batch has popular items many times: each item is projected once.
        pair = torch.cat((interaction[self.ITEM_ID], interaction[self.NEG_ITEM_ID]))
        items, place = torch.unique(pair, return_inverse=True)
        positive, negative = self.item_rows(items)[place].chunk(2)
        loss: Tensor = self.loss((users * positive).sum(1), (users * negative).sum(1))
        return loss

    def predict(self, interaction: Any) -> Tensor:
        """Scores of pairs of a user and an item: ``[n]``."""
        return (
            self.user_rows(interaction[self.USER_ID]) * self.item_rows(interaction[self.ITEM_ID])
        ).sum(1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of all items ``[n, n_items]``, as one product of two tables.

        :mod:`recbole_rcekd.models.scorer` makes use of that.
        """
        return torch.matmul(
            self.user_rows(interaction[self.USER_ID]), self.item_rows().transpose(0, 1)
        )


def prepare_features(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Subtract the mean vector of the items that have one, and scale each vector to length 1.

    All vectors of an encoder have a large part in common, which does not distinguish items; and the
    vectors of several encoders differ in scale. An item without a vector (a row of zeros) keeps the
    zeros, which are now the mean.

    Args:
        vectors: ``[n_items, n]``, row 0 the padding item.

    Returns:
        ``[n_items, n]`` in float32.
    """
    given = vectors.any(axis=1, keepdims=True)
    centred = np.where(given, vectors - vectors.sum(axis=0) / max(1, given.sum()), 0.0)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    prepared: np.ndarray[Any, Any] = (centred / np.where(length > 0, length, 1.0)).astype(
        np.float32
    )
    return prepared


class VBPRDataset(Dataset):  # type: ignore[misc]
    """RecBole's dataset, which checks ``item_features`` before RecBole fails on them."""

    def _init_alias(self) -> None:
        super()._init_alias()
        _id_fields(self.config, self)


def _id_fields(config: Any, dataset: Any) -> dict[str, str]:
    """For each name of vectors the field of item tokens under which RecBole keeps them."""
    names = config["item_features"]
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not names:
        raise SettingsError(
            f"[item_features] is {names!r}, but must name vectors, as in item_features: [text_vec]."
        )
    known = {value: key for key, value in (config["preload_weight"] or {}).items()}
    for name in names:
        if name not in known or name not in dataset.field2type:
            raise SettingsError(
                f"[item_features] names [{name}], which is not loaded. For vectors in a file "
                f"<dataset>.text with the columns tid:token and {name}:float_seq, write "
                "additional_feat_suffix: [text], alias_of_item_id: [tid], preload_weight: "
                f"{{tid: {name}}}, and in load_col text: [tid, {name}]."
            )
        if known[name] not in dataset.alias["item_id"]:
            raise SettingsError(
                f"The vectors [{name}] are by [{known[name]}], which RecBole does not take for an "
                f"item: write alias_of_item_id: [{known[name]}]."
            )
        if dataset.field2type[name] not in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
            raise _no_numbers(name)
    return {name: known[name] for name in names}


def _no_numbers(name: str) -> SettingsError:
    return SettingsError(
        f"The vectors [{name}] must be finite numbers: write {name}:float_seq in the first line of "
        "their file, and leave out the row of an item that has none."
    )


def _read_features(config: Any, dataset: Any) -> np.ndarray[Any, Any]:
    """The prepared vectors of all items, concatenated, from RecBole's preloaded weights.

    ``[n_items, n]``.
    """
    parts = []
    for name, id_field in _id_fields(config, dataset).items():
        vectors = dataset.get_preload_weight(id_field)
        if not np.isfinite(vectors).all():
            raise _no_numbers(name)
        parts.append(prepare_features(vectors.reshape(len(vectors), -1)))
    return np.concatenate(parts, axis=1)
