"""Distil any RecBole model into a small one, inside RecBole.

Three entry points: :func:`run_recbole_kd` (as ``run_recbole``, with a teacher),
:class:`DistillTrainer` with :func:`load_teacher` (in a pipeline of your own), and the command
``run_recbole_kd.py``.
"""

from __future__ import annotations

import importlib.util
import sys

if importlib.util.find_spec("recbole") is None:
    raise ModuleNotFoundError(
        "recbole_rcekd needs RecBole, which is not installed: pip install --no-deps recbole==1.2.1 "
        "(all else that RecBole needs was installed with this package)",
        name="recbole",
    )

from recbole_rcekd import compat

compat.apply()  # before anything imports recbole

from recbole_rcekd import models  # noqa: E402

models.register()  # before the Config of one of these models is built

from recbole_rcekd.core import distributed  # noqa: E402
from recbole_rcekd.core.errors import KDError  # noqa: E402
from recbole_rcekd.data import sequence_dataset  # noqa: E402
from recbole_rcekd.evaluation.analysis import analyse  # noqa: E402
from recbole_rcekd.quick_start import run_recbole_kd  # noqa: E402
from recbole_rcekd.teachers.load import load_teacher  # noqa: E402
from recbole_rcekd.training.trainer import DistillTrainer, distill_trainer  # noqa: E402

# The older names of these modules: they were documented, and files written by `save_dataset` and
# `save_dataloaders` contain them.
sys.modules[f"{__name__}.processes"] = distributed
sys.modules[f"{__name__}.sequences"] = sequence_dataset

__version__ = "0.1.0"
__all__ = [
    "DistillTrainer",
    "KDError",
    "analyse",
    "distill_trainer",
    "load_teacher",
    "run_recbole_kd",
]
