"""Models of our own that RecBole finds by name, as if they were its own."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from recbole.config import Config

from recbole_rcekd.settings import shipped_defaults

# Name → module, RecBole's folder for its type, and the Dataset class in that module (``None``: the type's own).
MODELS: dict[str, tuple[str, str, str | None]] = {
    "VBPR": ("recbole_rcekd.models.vbpr", "general_recommender", "VBPRDataset"),
}

_LOAD_DEFAULTS = Config._load_internal_config_dict


def register() -> None:
    """Make every model of :data:`MODELS` known to RecBole's ``get_model``, ``create_dataset`` and ``Config``."""
    for name, (place, folder, dataset_class) in MODELS.items():
        module = importlib.import_module(place)
        sys.modules[f"recbole.model.{folder}.{name.lower()}"] = module
        if dataset_class is not None:
            setattr(importlib.import_module("recbole.data.dataset"), f"{name}Dataset", getattr(module, dataset_class))
    Config._load_internal_config_dict = _load_defaults


def _load_defaults(self: Any, model: str, model_class: Any, dataset: str) -> None:
    """RecBole reads the defaults of a model only from a yaml file in its own folder; ours lie in ``properties/model``."""
    _LOAD_DEFAULTS(self, model, model_class, dataset)
    if model in MODELS:
        self.internal_config_dict.update(shipped_defaults(f"model/{model}"))
