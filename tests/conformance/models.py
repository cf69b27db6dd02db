"""All models of the installed RecBole, and the settings with which each is small and runs.

Nothing here says what a model can do. That is found by running it (:mod:`tests.conformance.facts`,
``checks``).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pkgutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

import recbole_rcekd  # noqa: F401  (mends RecBole before it is imported)
from recbole_rcekd.models import MODELS
from tests.conformance.world import (
    CONTEXT_COLUMNS,
    GENERAL_COLUMNS,
    KNOWLEDGE_COLUMNS,
    NAME,
    SEQUENCE_COLUMNS,
    VECTOR,
)

# isort: split
import recbole.model

Settings = dict[str, Any]

# The other model of a pair: for each package a simple one, if possible with scores that are a
# product of two tables. Scores of context-aware models are probabilities, which hardly differ when
# the model is hardly trained: there would be nothing to learn.
TEACHER_OF = {
    "general": "BPR",
    "knowledge_aware": "CKE",
    "sequential": "SASRec",
    "context_aware": "BPR",
    "exlib": "BPR",
}
STUDENT_OF = {**TEACHER_OF, "sequential": "GRU4Rec"}

_SMALL: Settings = {
    **dict.fromkeys(
        ("embedding_size", "kg_embedding_size", "mf_embedding_size", "mlp_embedding_size"), 8
    ),
    **dict.fromkeys(
        (
            "ui_embedding_size",
            "neigh_embedding_size",
            "gcn_output_dim",
            "hidden_size",
            "weight_size",
        ),
        8,
    ),
    **dict.fromkeys(("latent_dimension", "low_rank", "rank"), 4),
    **{
        key: [8]
        for key in ("mlp_hidden_size", "encoder_hidden_size", "dims_dnn", "in_dims", "layers")
    },
    **{key: [8] for key in ("cin_layer_size", "t_cin", "critic_layers", "order_list")},
    **dict.fromkeys(
        ("hidden_dimension", "attention_size", "inner_size", "num_conv_kernel", "n_memory"), 8
    ),
    **dict.fromkeys(
        ("n_layers", "n_heads", "num_heads", "cross_layer_num", "expert_num", "n_factors"), 2
    ),
    **dict.fromkeys(("num_layers", "n_enc_epochs", "n_dec_epochs", "n_hop"), 1),
    **dict.fromkeys(("block_num", "depth", "t_depth", "nv", "nh", "steps"), 2),
    **dict.fromkeys(("prototype_size", "k_interests", "num_clusters", "metrics_k"), 5),
    **dict.fromkeys(("warm_up_step", "pretrain_epochs", "save_step"), 1),
    "history_len": 10,
    "neigh_num": 10,
    "reranker_CAN_NUM": 20,
}
_LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}
_BY_USER = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}
_ONE_NEGATIVE = {"distribution": "uniform", "sample_num": 1}
# Auto-encoders and HSTU are trained on users. Without small batches an epoch of forty users would
# be one step.
_NO_NEGATIVES: Settings = {"train_neg_sample_args": None, "train_batch_size": 12}
_ITEM_CLASS = {"load_col": {**SEQUENCE_COLUMNS, "item": ["item_id", "class"]}}

_OF_PACKAGE: dict[str, Settings] = {
    "general": {"load_col": GENERAL_COLUMNS},
    "knowledge_aware": {"load_col": KNOWLEDGE_COLUMNS},
    "sequential": {
        "load_col": SEQUENCE_COLUMNS,
        "eval_args": _LEAVE_ONE_OUT,
        "MAX_ITEM_LIST_LENGTH": 6,
    },
    "context_aware": {
        "load_col": CONTEXT_COLUMNS,
        "numerical_features": ["age", "price"],
        "eval_args": _BY_USER,
        "train_neg_sample_args": _ONE_NEGATIVE,
    },
    # Trees learn labels, not rankings: ratings above the threshold are positive.
    "exlib": {
        "load_col": {**CONTEXT_COLUMNS, "inter": ["user_id", "item_id", "rating"]},
        "threshold": {"rating": 4},
        "eval_args": {**_BY_USER, "mode": "labeled"},
        "train_neg_sample_args": None,
        "metrics": ["AUC"],
        "valid_metric": "AUC",
    },
}
_PRETRAINED: Settings = {
    "load_col": {
        **SEQUENCE_COLUMNS,
        "kg": ["head_id", "relation_id", "tail_id"],
        "link": ["item_id", "entity_id"],
        "ent": ["ent_id", "ent_vec"],
        "rel": ["rel_id", "rel_vec"],
    },
    "additional_feat_suffix": ["ent", "rel"],
    "alias_of_entity_id": ["ent_id"],
    "alias_of_relation_id": ["rel_id"],
    "preload_weight": {"ent_id": "ent_vec", "rel_id": "rel_vec"},
    "kg_embedding_size": VECTOR,
}
_VECTORS: Settings = {
    "load_col": {**GENERAL_COLUMNS, "text": ["tid", "text_vec"]},
    "additional_feat_suffix": ["text"],
    "alias_of_item_id": ["tid"],
    "preload_weight": {"tid": "text_vec"},
    "item_features": ["text_vec"],
    "feature_embedding_size": 8,
}
_WITH_FEATURES: Settings = {
    "load_col": {**CONTEXT_COLUMNS, **SEQUENCE_COLUMNS},
    "numerical_features": ["age", "price"],
}
_SPECIAL: dict[str, Settings] = {
    "VBPR": _VECTORS,
    # RecBole refuses to sample negatives for auto-encoders.
    **dict.fromkeys(
        ("CDAE", "MultiDAE", "MultiVAE", "RecVAE", "DiffRec", "LDiffRec"), _NO_NEGATIVES
    ),
    "RaCT": {**_NO_NEGATIVES, "train_stage": "finetune"},
    "MacridVAE": {**_NO_NEGATIVES, "kfac": 2},
    "ConvNCF": {"embedding_size": 64},  # its convolutions need this size
    "KD_DAGFM": {"phase": "finetuning"},
    "HSTU": {**_NO_NEGATIVES, "attention_dim": 4, "linear_dim": 4, "n_negatives": 20},
    "KTUP": {"use_st_gumbel": False},  # with it, even its evaluation draws noise
    **dict.fromkeys(("SASRecF", "FDSA", "GRU4RecF"), _ITEM_CLASS),
    "S3Rec": {**_ITEM_CLASS, "train_stage": "finetune"},
    **dict.fromkeys(("GRU4RecKG", "KSR"), _PRETRAINED),
    "DIN": _WITH_FEATURES,
    "DIEN": _WITH_FEATURES,
}
# Earlier stages of training and their settings. The next stage starts from the checkpoint at
# `pre_model_path` or, in KD_DAGFM, at `warm_up`.
STAGES: dict[str, list[Settings]] = {
    "KD_DAGFM": [{"phase": "teacher_training"}],
    "S3Rec": [{"train_stage": "pretrain"}],
    "RaCT": [{"train_stage": "actor_pretrain"}, {"train_stage": "critic_pretrain"}],
}


@dataclass(frozen=True)
class Model:
    """A model of RecBole: its name and its package (``general``, ``sequential``, …)."""

    name: str
    package: str


@functools.cache
def registry() -> dict[str, Model]:
    """All models that ``recbole.utils.get_model`` finds, RecBole's and ours.

    RecBole's are read from its sources without importing them. A model's class has the name of its
    file except for capitals. The sources are parsed once, because Python before 3.11.8 can fail
    (SystemError) if the error of a thread is reported, which parses too, at the same moment.
    """
    found = {
        name: Model(name, own.kind.removesuffix("_recommender")) for name, own in MODELS.items()
    }
    for package in pkgutil.iter_modules(recbole.model.__path__):
        if not package.name.endswith("_recommender") or not package.ispkg:
            continue
        spec = importlib.util.find_spec(f"recbole.model.{package.name}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        for module in pkgutil.iter_modules(spec.submodule_search_locations):
            source = Path(next(iter(spec.submodule_search_locations)), f"{module.name}.py")
            for node in ast.parse(source.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name.lower() == module.name:
                    found[node.name] = Model(node.name, package.name.removesuffix("_recommender"))
    return dict(sorted(found.items(), key=lambda item: (item[1].package, item[0].lower())))


def shipped(name: str) -> Settings:
    """The settings that come with a model."""
    files = [
        file
        for package in ("recbole.properties", "recbole_rcekd.properties")
        for file in resources.files(package).joinpath("model").iterdir()
        if file.name.lower() == f"{name}.yaml".lower()
    ]
    return yaml.safe_load(files[0].read_text(encoding="utf-8")) or {} if files else {}


def settings_of(model: Model) -> Settings:
    """The settings of a model on the world dataset."""
    # RecBole looks for LightGBM.yaml and ships lightgbm.yaml, so its trees start without settings.
    start = {**shipped(model.name), **_SMALL} if model.package == "exlib" else _SMALL
    settings = {**start, **_OF_PACKAGE[model.package], **_SPECIAL.get(model.name, {})}
    if model.package == "sequential" and shipped(model.name).get("loss_type") == "CE":
        # RecBole refuses negatives with a cross-entropy over all items.
        settings["train_neg_sample_args"] = None
    return {"train_batch_size": 64, "learning_rate": 0.01, "dataset": NAME, **settings}


def data_settings(model: Model) -> Settings:
    """The settings that decide interactions and features, which teacher and student share.

    Pretrained vectors are left out, because only the dataset classes of the models made for them
    can read them.
    """
    settings = settings_of(model)
    shared = (
        "eval_args",
        "MAX_ITEM_LIST_LENGTH",
        "numerical_features",
        "threshold",
        "metrics",
        "valid_metric",
    )
    columns = (
        _OF_PACKAGE[model.package]["load_col"]
        if "preload_weight" in settings
        else settings["load_col"]
    )
    return {"load_col": columns, **{key: settings[key] for key in shared if key in settings}}
