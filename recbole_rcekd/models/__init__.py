"""RecBole models, and what they need to be scored: HSTU, VBPR, and an adapter for all models.

RecBole finds the models of this package by their names: ``run_recbole(model="HSTU")``. Such a model
is one line in :data:`MODELS`, a module of the same name in lower case, and
``properties/model/<Model>.yaml``.
"""

from __future__ import annotations

import importlib
from importlib import resources
from typing import NamedTuple

from recbole_rcekd import compat

__all__ = ["MODELS", "register"]


class OwnModel(NamedTuple):
    """Where a model of this package is defined.

    Attributes:
        module: the module that defines the class.
        kind: the package below ``recbole.model`` in which RecBole will find it.
        dataset: the class in the same module with which RecBole loads the model's data; ``None``:
            RecBole's class for this kind of models.
    """

    module: str
    kind: str
    dataset: str | None = None


MODELS: dict[str, OwnModel] = {
    "HSTU": OwnModel("recbole_rcekd.models.hstu", "sequential_recommender", "HSTUDataset"),
    "VBPR": OwnModel("recbole_rcekd.models.vbpr", "general_recommender", "VBPRDataset"),
}


def register() -> None:
    """Make every model of :data:`MODELS` known to RecBole; calling it again changes nothing."""
    defaults = resources.files("recbole_rcekd.properties").joinpath("model")
    for name, own in MODELS.items():
        module = importlib.import_module(own.module)
        dataset = getattr(module, own.dataset) if own.dataset else None
        compat.add_model(name, module, own.kind, str(defaults.joinpath(f"{name}.yaml")), dataset)
