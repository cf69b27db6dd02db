"""Reading RecBole checkpoints without running what a stranger put into them.

RecBole pickles its Config, so ``torch.load(weights_only=True)`` rejects every checkpoint of it, and
``weights_only=False`` runs any code that the file contains. The unpickler here builds only what
RecBole's own files contain; classes that are merely mentioned (the model's, a yaml loader) come
back as inert names.
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

# (module, names) that may be built. Nothing here opens files, imports, or calls what it is given.
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

# Modules whose classes are only ever mentioned in a Config, or belong to a part of the model that
# some models of features (SASRecF and DIN, for example) save whole, with the dataset in it: such a
# part comes back as an inert thing.
_MENTIONED = (
    "recbole.model.",
    "recbole_rcekd.models.",
    "yaml.",
    "torch.nn.modules.",
    "recbole.data.",
    "recbole.sampler.",
)


class _Refused(pickle.UnpicklingError):
    """The file asks for something that is not on the allow-list."""


class _Named(type):
    """Metaclass of inert stand-ins: the name of a class, without the class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(f"the file tries to call {cls.__module__}.{cls.__qualname__}")


class _EmptyConfig:
    """A Config that is not constructed, but filled afterwards: its constructor passes strings to ``eval``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            raise _Refused(f"the file tries to call {Config.__module__}.{Config.__qualname__}")
        return object.__new__(Config)


def _enum_member(cls: Any, name: str) -> Any:
    """The only use of ``getattr`` in a checkpoint: some Python versions pickle enum members by name."""
    if not (isinstance(cls, type) and issubclass(cls, Enum) and name in cls.__members__):
        raise _Refused("the file looks up an attribute")
    return cls[name]


def _no_logger(name: str = "") -> None:
    """What a dataset's logger becomes."""


class _AllowListUnpickler(pickle._Unpickler):
    def _load_build(self) -> None:
        # It sets attributes; of a class they would be everybody's.
        if isinstance(self.stack[-2], type):  # type: ignore[attr-defined]
            raise _Refused("the file changes a class")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    # In Python, not in C, for the sake of this entry; tensors are not read by it.
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
    """What ``torch.load`` expects as ``pickle_module``."""
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
        trust: run whatever the file contains (``teacher_trust: True``); for files of your own
            making only.

    Returns:
        RecBole's dict: ``config``, ``state_dict``, ``other_parameter``, …; without ``trust``, other
        parameters that are parts of the model are left out: their weights are in the
        ``state_dict``.

    Raises:
        TeacherError: there is no such file, it is damaged, not a RecBole checkpoint, or needs
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
        # torch.load runs the code of such an archive, whatever the unpickler is.
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
