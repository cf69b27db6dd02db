"""Reads RecBole checkpoints without running code that somebody put into the file.

RecBole pickles its Config, so ``torch.load(weights_only=True)`` rejects each of its checkpoints,
and ``weights_only=False`` runs any code that the file contains. The unpickler here only builds
objects that RecBole's own files contain. Classes that a file only mentions (the model's class, a
yaml loader) become names without content.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from recbole.config import Config

from recbole_rcekd.core.errors import TeacherError

_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")

# The names in each module that may be built. None of them opens files, imports modules or calls its
# arguments.
_BUILDABLE: dict[str, frozenset[str]] = {
    "recbole.utils.enum_type": frozenset(
        {
            "ModelType",
            "KGDataLoaderState",
            "EvaluatorType",
            "InputType",
            "FeatureType",
            "FeatureSource",
        }
    ),
    "collections": frozenset({"OrderedDict", "defaultdict"}),
    "builtins": frozenset(
        {"list", "dict", "set", "frozenset", "slice", "range", "complex", "bytearray"}
    ),
    "torch": frozenset({"device", "Size", "dtype"}),
    "torch._utils": frozenset(
        {"_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_sparse_tensor"}
    ),
    "torch.serialization": frozenset({"_get_layout"}),
    "torch.storage": frozenset({"UntypedStorage", "TypedStorage"}),
    "numpy": frozenset({"dtype", "ndarray", "matrix"}),
    **{module: frozenset({"scalar", "_reconstruct"}) for module in _NUMPY},
    "scipy.sparse._csr": frozenset({"csr_matrix"}),
    "scipy.sparse._csc": frozenset({"csc_matrix"}),
    "scipy.sparse._coo": frozenset({"coo_matrix"}),
    "scipy.sparse._lil": frozenset({"lil_matrix"}),
    "_codecs": frozenset({"encode"}),
}

# Modules whose classes become names without content. A Config mentions some of them. Others belong
# to a part of the model that some feature-based models (SASRecF and DIN, for example) save whole,
# with the dataset in it.
_MENTIONED = (
    "recbole.model.",
    "recbole_rcekd.models.",
    "yaml.",
    "torch.nn.modules.",
    "recbole.data.",
    "recbole.sampler.",
)


class _Refused(pickle.UnpicklingError):
    """The file needs something that is not on the allow-list."""


class _Named(type):
    """Metaclass of the classes that stand for those a file mentions: a name without content."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(f"the file tries to call {cls.__module__}.{cls.__qualname__}")


class _EmptyConfig:
    """Makes an empty Config, which the unpickler then fills.

    Config's own constructor would pass strings to ``eval``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            raise _Refused(f"the file tries to call {Config.__module__}.{Config.__qualname__}")
        return object.__new__(Config)


def _enum_member(cls: Any, name: str) -> Any:
    """The member of an enum by its name, in place of ``getattr``.

    Some Python versions pickle enum members with ``getattr``; checkpoints need it for nothing else.
    """
    if not (isinstance(cls, type) and issubclass(cls, Enum) and name in cls.__members__):
        raise _Refused("the file looks up an attribute")
    return cls[name]


def _no_logger(name: str = "") -> None:
    """``None`` in place of a dataset's logger."""


class _AllowListUnpickler(pickle._Unpickler):
    def _load_build(self) -> None:
        # This sets attributes of an object. Attributes of a class would change all its objects.
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise _Refused("the file changes a class")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    # The unpickler written in Python, not the one in C, is used because of this entry. Tensors are
    # not read by it, so this costs little time.
    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _load_build,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) == (Config.__module__, Config.__qualname__):
            return _EmptyConfig
        if (module, name) == ("logging", "getLogger"):
            return _no_logger
        if name in _BUILDABLE.get(module, ()):
            return super().find_class(module, name)
        if module.startswith(_MENTIONED):
            return _Named(name, (), {"__module__": module})
        raise _Refused(f"the file needs {module}.{name}")


def _allow_list_module() -> ModuleType:
    """A module that ``torch.load`` takes as ``pickle_module``."""
    module = ModuleType("recbole_rcekd_allow_list_pickle")

    def load(file: io.BufferedIOBase, **kwargs: Any) -> Any:
        return _AllowListUnpickler(file, **kwargs).load()

    for name, value in {"Unpickler": _AllowListUnpickler, "load": load}.items():
        setattr(module, name, value)
    return module


def read_checkpoint(path: str | Path, trust: bool = False) -> dict[str, Any]:
    """Read a RecBole checkpoint onto the CPU.

    Args:
        path: a file written by RecBole's ``Trainer``.
        trust: run any code that the file contains (``teacher_trust: True``); only for files that
            you made yourself.

    Returns:
        RecBole's dict: ``config``, ``state_dict``, ``other_parameter``, … Without ``trust``, parts
        of the model are left out of ``other_parameter``; their weights are in the ``state_dict``.

    Raises:
        TeacherError: there is no such file, or it is damaged, or no RecBole checkpoint, or it needs
            something that is not on the allow-list.
    """
    path = Path(path)
    if not path.is_file():
        raise TeacherError(f"There is no checkpoint at [{path}].")
    if not zipfile.is_zipfile(path):
        raise TeacherError(
            f"[{path}] is not a checkpoint, or was cut off while it was written: train it again. "
            "Names of files of scores end in .csv, .tsv, .parquet or .npz."
        )
    try:
        # torch.load runs the code of a TorchScript archive, with any unpickler.
        if not trust and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records():
            raise _Refused("the file is a TorchScript program")
        content = torch.load(
            path,
            map_location="cpu",
            weights_only=False,
            pickle_module=None if trust else _allow_list_module(),
        )
    except _Refused as error:
        raise TeacherError(
            f"[{path}] was not read, because {error}; there is nothing of the kind in RecBole's "
            "own checkpoints. If the file is your own, set teacher_trust: True; a pickle from a "
            "stranger can run any code."
        ) from error
    except Exception as error:
        raise TeacherError(f"[{path}] is damaged or not a RecBole checkpoint ({error}).") from error
    if not isinstance(content, dict) or not {"config", "state_dict"} <= content.keys():
        raise TeacherError(
            f"[{path}] is not a RecBole checkpoint: it lacks [config] or [state_dict]."
        )
    if not isinstance(content["state_dict"], (dict, OrderedDict)):
        raise TeacherError(
            f"[{path}] is not a RecBole checkpoint: its [state_dict] is no dict of tensors (nor is "
            "a decision tree's)."
        )
    other = content.get("other_parameter")
    if isinstance(other, dict):
        content["other_parameter"] = {
            name: part for name, part in other.items() if type(type(part)) is not _Named
        }
    return content
