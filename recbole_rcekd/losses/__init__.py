"""The distillation losses. To add one, see ``CONTRIBUTING.md``: a file here, a line in ``LOSSES``, a yaml, a test."""

from __future__ import annotations

from recbole_rcekd.errors import SettingsError
from recbole_rcekd.losses.base import FeatureLoss, KDLoss, Loss
from recbole_rcekd.losses.cd import CDLoss
from recbole_rcekd.losses.ce import CELoss
from recbole_rcekd.losses.fce import FCELoss
from recbole_rcekd.losses.hetcomp import HetCompLoss
from recbole_rcekd.losses.rce import RCELoss
from recbole_rcekd.losses.rrd import RRDLoss
from recbole_rcekd.settings import nearest

LOSSES: dict[str, type[Loss]] = {
    "rce": RCELoss,
    "ce": CELoss,
    "fce": FCELoss,
    "cd": CDLoss,
    "rrd": RRDLoss,
    "hetcomp": HetCompLoss,
}

__all__ = [
    "LOSSES",
    "CDLoss",
    "CELoss",
    "FCELoss",
    "FeatureLoss",
    "HetCompLoss",
    "KDLoss",
    "Loss",
    "RCELoss",
    "RRDLoss",
    "get_loss",
]


def get_loss(name: str) -> type[Loss]:
    """The loss class called ``name`` in ``kd_loss``.

    Raises:
        SettingsError: there is none; the message lists what exists.
    """
    if name not in LOSSES:
        raise SettingsError(f"[kd_loss] names {name!r}, which is not a loss. {nearest(name, [*LOSSES, 'scratch'])}")
    return LOSSES[name]
