"""Changes of single instances of RecBole's classes, as long as a training needs them.

RecBole has no hooks for these changes. They are undone when the block ends, also after an error. So
after a training, the model, the trainer and the loader are as RecBole made them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


@contextmanager
def replaced(instance: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, replace an attribute of one instance.

    Only this attribute is restored. (``patch.dict`` would also undo all others that are set in the
    block.)

    Args:
        instance: an object; other instances of its class stay as they are.
        name: the name of the attribute, or of a method.
        value: the new value.
    """
    attributes = vars(instance)  # without `__setattr__`, in which torch's loaders refuse some names
    before = attributes.get(name, _MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        if before is _MISSING:
            del attributes[name]
        else:
            attributes[name] = before


def loss_name(model: Any) -> str:
    """The name of the model's method that computes the recommendation loss.

    MKR has two losses, and its trainer does not call ``calculate_loss`` (trainer.py:845).
    """
    return "calculate_rs_loss" if hasattr(model, "calculate_rs_loss") else "calculate_loss"


@contextmanager
def loss_replaced(model: Any, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, replace the model's loss.

    Several of RecBole's trainers ignore the ``loss_func`` given to ``_train_epoch``
    (trainer.py:687, :719, :845, :1258), and NCL's never calls the base class (:1414).

    Args:
        model: a RecBole model.
        make: a function of the model's own method, which returns the new one.
    """
    name = loss_name(model)
    with replaced(model, name, make(getattr(model, name))):
        yield


@contextmanager
def forward_replaced(model: Any, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within the block, replace the model's ``forward``.

    RecBole's models call ``self.forward(…)``, and such a call does not run torch's hooks.

    Args:
        model: a RecBole model.
        make: a function of the model's own method, which returns the new one.
    """
    with replaced(model, "forward", make(model.forward)):
        yield


def config_for_one(config: Any) -> Any:
    """A Config for a checkpoint, without the settings of training in several processes.

    With them, a process that opens the checkpoint would wait for the other processes.
    """
    if config["single_spec"]:
        return config
    alone = copy.deepcopy(config)
    alone["single_spec"] = True
    return alone
