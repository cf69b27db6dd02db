"""HSTU: SiLU attention over a user's items, trained at all positions of the sequence at once.

Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for
Generative Recommendations", ICML 2024. In the experiments of RCE-KD it is the sequential teacher (8
blocks) and student (1 block).
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_rcekd.core.errors import SettingsError
from recbole_rcekd.core.settings import Settings, setting
from recbole_rcekd.data.sequence_dataset import SequenceDataset

# The time bias has a bucket for each ⌊ln(seconds) / .301⌋, as in HSTU's code. (Of the 128 buckets,
# 64 already reach beyond 10⁸ s, 3 years.)
_TIME_BUCKETS = 128
_LOG_SECONDS_PER_BUCKET = 0.301
# ε of the layer normalisation and of the normalisation to length 1, as in HSTU's code.
_EPS = 1e-6
# The authors of RCE-KD divide attention by the maximal length plus this many positions, which
# HSTU's code reserves for output.
_OUTPUT_PLACES = 10


@dataclass(frozen=True)
class HSTUSettings(Settings):
    """The settings of HSTU; ``properties/model/HSTU.yaml`` documents them and has the defaults."""

    hidden_size: int = setting(64, low=1)
    n_layers: int = setting(2, low=1)
    n_heads: int = setting(2, low=1)
    attention_dim: int = setting(32, low=1)
    linear_dim: int = setting(32, low=1)
    hidden_dropout_prob: float = setting(0.5, low=0, high=1)
    emb_dropout_prob: float = setting(0.5, low=0, high=1)
    n_negatives: int = setting(512, low=1)
    temperature: float = setting(0.05, above=0)
    relative_bias: typing.Literal["none", "position", "position_time"] = "position"
    score_scale: typing.Literal["temperature", "cosine"] = "temperature"
    initializer_range: float = setting(0.02, above=0)


class HSTUBlock(nn.Module):
    r"""One block of HSTU: gated attention without a softmax, added to its input.

    .. math::
        u, v, q, k &= \mathrm{SiLU}(\mathrm{norm}(x)\, W) \\
        a_{ij} &= \mathrm{SiLU}(q_i^\top k_j + b_{ij}) / n \quad (j \le i) \\
        y_i &= x_i + \mathrm{dropout}\bigl(W_o\,(u_i \odot
            \mathrm{norm}(\textstyle\sum_j a_{ij} v_j)) + c\bigr)

    Each head has its own q, k and v; n is ``max_length`` + 10 (as in RCE-KD's code), and norm is a
    layer normalisation without parameters (as in HSTU's code). The relative bias b is shared by all
    heads. It has a number for each distance i − j and, with ``position_time``, one for each bucket
    of ln(t_i − t_j).

    Args:
        settings: the settings of the model.
        max_length: the maximal length of a sequence.
    """

    def __init__(self, settings: HSTUSettings, max_length: int) -> None:
        super().__init__()
        self.n_heads = settings.n_heads
        values, queries = (
            settings.n_heads * settings.linear_dim,
            settings.n_heads * settings.attention_dim,
        )
        self.sizes = [values, values, queries, queries]
        self.n = max_length + _OUTPUT_PLACES
        self.project = nn.Linear(settings.hidden_size, sum(self.sizes), bias=False)
        self.project_out = nn.Linear(values, settings.hidden_size)
        self.dropout = nn.Dropout(settings.hidden_dropout_prob)
        biased = settings.relative_bias != "none"
        self.position_bias = nn.Parameter(torch.empty(max_length)) if biased else None
        timed = settings.relative_bias == "position_time"
        self.time_bias = nn.Parameter(torch.empty(_TIME_BUCKETS)) if timed else None

        nn.init.normal_(self.project.weight, std=settings.initializer_range)
        nn.init.xavier_uniform_(self.project_out.weight)
        nn.init.zeros_(self.project_out.bias)
        for bias in (self.position_bias, self.time_bias):
            if bias is not None:
                nn.init.normal_(bias, std=settings.initializer_range)

    def forward(self, x: Tensor, real: Tensor, time_buckets: Tensor | None = None) -> Tensor:
        """Apply the block to the positions of a batch that have items, row after row.

        Padding takes time only in the attention, whose rows have equal length.

        Args:
            x: the input at the T positions with items, ``[T, d]``.
            real: which positions have items, bool ``[B, L]``.
            time_buckets: the bucket of each t_i − t_j for the time bias, ``[B, L, L]``.

        Returns:
            ``[T, d]``.
        """
        rows, length = real.shape
        place = real.view(-1).nonzero().squeeze(1)
        projected = F.silu(self.project(_layer_norm(x)))
        u, vqk = torch.split(projected, [self.sizes[0], sum(self.sizes[1:])], dim=-1)
        vqk = vqk.new_zeros(rows * length, vqk.shape[1]).index_copy(0, place, vqk)
        v, q, k = (
            each.view(rows, length, self.n_heads, -1).transpose(1, 2)  # [B, heads, L, c]
            for each in torch.split(vqk, self.sizes[1:], dim=-1)
        )
        logits = q @ k.transpose(2, 3)
        if self.position_bias is not None:
            step = torch.arange(length, device=x.device)
            logits = logits + self.position_bias[(step.unsqueeze(1) - step).clamp(min=0)]
        if self.time_bias is not None and time_buckets is not None:
            logits = logits + self.time_bias[time_buckets].unsqueeze(1)
        # Padding comes after all items, so the mask of the future also masks padding.
        past = torch.full((length, length), 1 / self.n, dtype=x.dtype, device=x.device).tril()
        attended = (
            ((F.silu(logits) * past) @ v)
            .transpose(1, 2)
            .reshape(rows * length, -1)
            .index_select(0, place)
        )
        added: Tensor = self.dropout(self.project_out(u * _layer_norm(attended)))
        return x + added


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _cosine_form(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1, eps=_EPS)


class HSTU(SequentialRecommender):  # type: ignore[misc]
    r"""HSTU, a sequential model whose score is the cosine of a query and an item.

    The cosine is divided by the temperature, unless ``score_scale`` says otherwise. The input of
    the blocks (:class:`HSTUBlock`) is item · √d + position, with dropout. The loss is a sampled
    softmax. For the query z of a position, the next item p and the negatives N, which are drawn
    uniformly and shared by the whole batch, it is

    .. math::
        -\log \frac{e^{\cos(z, p)/\tau}}
            {e^{\cos(z, p)/\tau} + \sum_{i \in N, i \ne p} e^{\cos(z, i)/\tau}},

    averaged over all positions of all rows. The next item of the last position is the row's target.
    So one training row per user is enough (:class:`HSTUDataset`).

    Args:
        config: RecBole's Config.
        dataset: the training data.

    Raises:
        SettingsError: a setting is refused, RecBole is set to draw negatives, or the time bias is
            on and the data have no time stamps.
    """

    input_type = InputType.POINTWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.settings = HSTUSettings.from_mapping({key: config[key] for key in HSTUSettings.keys()})
        drawn = config["train_neg_sample_args"]["distribution"]
        if drawn != "none":
            raise SettingsError(
                f"[train_neg_sample_args] draws {drawn} negatives, but HSTU draws its own; write "
                "train_neg_sample_args: ~."
            )
        self.time_field = f"{config['TIME_FIELD']}{config['LIST_SUFFIX']}"
        self.timed = self.settings.relative_bias == "position_time"
        if self.timed and self.time_field not in dataset.inter_feat:
            raise self._no_times()
        self.hidden_size = self.settings.hidden_size
        self.item_embedding = nn.Embedding(self.n_items, self.hidden_size, padding_idx=0)
        self.position_embedding = nn.Embedding(self.max_seq_length, self.hidden_size)
        self.dropout = nn.Dropout(self.settings.emb_dropout_prob)
        self.blocks = nn.ModuleList(
            HSTUBlock(self.settings, self.max_seq_length) for _ in range(self.settings.n_layers)
        )

        std = self.settings.initializer_range
        nn.init.normal_(self.item_embedding.weight, std=std)
        # As large as the item embeddings after they are multiplied by √d.
        nn.init.normal_(self.position_embedding.weight, std=std * math.sqrt(self.hidden_size))
        with torch.no_grad():
            self.item_embedding.weight[0] = 0

    def forward(
        self, item_seq: Tensor, item_seq_len: Tensor, time_seq: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The output of the last block at all positions with items, row after row.

        Args:
            item_seq: items, padded on the right with 0, ``[B, L]``.
            item_seq_len: number of items, ``[B]``.
            time_seq: the time stamps of the items, in seconds, ``[B, L]``; for
                ``relative_bias: position_time`` only.

        Returns:
            The output ``[T, d]``, and which positions have items, bool ``[B, L']``; L' is the
            length of the longest row.

        Raises:
            SettingsError: the time bias is on and there are no time stamps.
        """
        # RecBole makes no row without items; such a row counts as one padding item.
        item_seq_len = item_seq_len.clamp(min=1)
        longest = int(item_seq_len.max())
        item_seq = item_seq[:, :longest]
        position = torch.arange(longest, device=item_seq.device).expand_as(item_seq)
        real = position < item_seq_len.unsqueeze(1)
        time_buckets = None
        if self.timed:
            if time_seq is None:
                raise self._no_times()
            time_buckets = self._time_buckets(time_seq[:, :longest])
        items = self.item_embedding(item_seq[real]) * math.sqrt(self.hidden_size)
        x = self.dropout(items + self.position_embedding(position[real]))
        for block in self.blocks:
            x = block(x, real, time_buckets)
        return x, real

    def calculate_loss(self, interaction: Any) -> Tensor:
        """The sampled softmax loss, averaged over all positions with items."""
        item_seq, item_seq_len = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        hidden, real = self(item_seq, item_seq_len, self._times(interaction))
        # The target of a position is the next item; at the last position, the row's target.
        targets = item_seq[:, : real.shape[1]].roll(-1, dims=1)
        targets = targets.scatter(
            1, (item_seq_len - 1).unsqueeze(1), interaction[self.POS_ITEM_ID].unsqueeze(1)
        )
        return self.sampled_softmax(_cosine_form(hidden), targets[real], self._draw_negatives())

    def sampled_softmax(self, queries: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Mean loss of ``queries [T, d]`` of length 1.

        Each query has one of ``targets [T]`` and all of ``negatives [R]``.
        """
        items = _cosine_form(self.item_embedding(torch.cat([targets, negatives])))
        queries = queries / self.settings.temperature
        positive = (queries * items[: len(targets)]).sum(-1)
        others = queries @ items[len(targets) :].t()
        # A finite number, so that the gradient is 0 and not NaN if no negative is left.
        others = others.masked_fill(
            targets.unsqueeze(1) == negatives, torch.finfo(others.dtype).min
        )
        return F.softplus(torch.logsumexp(others, 1) - positive).mean()

    def predict(self, interaction: Any) -> Tensor:
        """Scores of one item for each row, ``[B]``."""
        items = _cosine_form(self.item_embedding(interaction[self.ITEM_ID]))
        return (self._query(interaction) * items).sum(-1)

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item, ``[B, n_items]``."""
        table = _cosine_form(self.item_embedding.weight)
        return torch.matmul(self._query(interaction), table.transpose(0, 1))

    def _query(self, interaction: Any) -> Tensor:
        """The query at the last item of each row, scaled by ``score_scale``, ``[B, d]``."""
        hidden, real = self(
            interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], self._times(interaction)
        )
        query = _cosine_form(hidden[real.sum(1).cumsum(0) - 1])
        return (
            query / self.settings.temperature
            if self.settings.score_scale == "temperature"
            else query
        )

    def _draw_negatives(self) -> Tensor:
        return torch.randint(
            1, self.n_items, (self.settings.n_negatives,), device=self.item_embedding.weight.device
        )

    def _times(self, interaction: Any) -> Tensor | None:
        return (
            interaction[self.time_field] if self.timed and self.time_field in interaction else None
        )

    def _time_buckets(self, times: Tensor) -> Tensor:
        """Buckets of t_i − t_j, ``[B, L, L]``; attention masks those with j in the future."""
        between = (times.unsqueeze(2) - times.unsqueeze(1)).clamp(min=1)
        return (between.log() / _LOG_SECONDS_PER_BUCKET).long().clamp(max=_TIME_BUCKETS - 1)

    def _no_times(self) -> SettingsError:
        return SettingsError(
            f"[relative_bias] is 'position_time', but there is no [{self.time_field}]: load the "
            f"time field (load_col: {{inter: [user_id, item_id, timestamp]}}), or set "
            "relative_bias: position."
        )


class HSTUDataset(SequenceDataset):
    """RecBole's sequential data with one training row per user, the longest.

    RecBole makes a row of every prefix of a user's sequence, and HSTU learns from all positions of
    a row. With all rows, it would learn from the early items again and again. The rows for
    validation and test stay.

    Attributes:
        training_pairs: ids of users and items, ``[n]`` each, of all training interactions, each
            pair once, in ascending order. (The remaining rows have only the last
            MAX_ITEM_LIST_LENGTH items.) Set by :meth:`build`.
    """

    training_pairs: tuple[Tensor, Tensor]

    def build(self) -> list[Any]:
        """RecBole's split with the longest training row of each user (the last of several)."""
        train, *others = super().build()
        rows = train.inter_feat
        users, lengths = rows[self.uid_field], rows[self.item_list_length_field]
        # lexsort is stable: rows of equal length keep their order.
        order = torch.from_numpy(np.lexsort((lengths.numpy(), users.numpy())))
        users, items = users[order], rows[self.iid_field][order]
        lists = rows[self.iid_field + self.config["LIST_SUFFIX"]][order]
        last = torch.ones(len(users), dtype=torch.bool)
        last[:-1] = users[1:] != users[:-1]
        pairs = getattr(train, "training_pairs", None) or _distinct_pairs(users, items, lists, last)
        train = train.copy(rows[order[last]])
        for each in (train, *others):
            each.training_pairs = pairs
        return [train, *others]


def _distinct_pairs(
    users: Tensor, items: Tensor, lists: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """The distinct pairs of a user and an item, target or listed, in rows by user and length."""
    # Most items are left out here: they are in the row before, at the same position or the next.
    new = lists != 0
    same_user = ~last[:-1].unsqueeze(1)
    new[1:] &= ~(same_user & (lists[1:] == lists[:-1]))
    new[1:, :-1] &= ~(same_user & (lists[1:, :-1] == lists[:-1, 1:]))
    row, _ = new.nonzero(as_tuple=True)
    n_items = int(max(items.max(), lists.max())) + 1
    keys = torch.unique(torch.cat([users * n_items + items, users[row] * n_items + lists[new]]))
    return torch.div(keys, n_items, rounding_mode="floor"), keys % n_items
