"""The distillation losses. To add one, see ``CONTRIBUTING.md``: a file here, a line in ``LOSSES``, a yaml, a test."""

from __future__ import annotations

from recbole_rcekd.errors import SettingsError
from recbole_rcekd.losses.base import FeatureLoss, KDLoss, Loss
from recbole_rcekd.losses.cd import CDLoss
from recbole_rcekd.losses.ce import CELoss
from recbole_rcekd.losses.dcd import DCDLoss
from recbole_rcekd.losses.dcd_port import DCDPortLoss
from recbole_rcekd.losses.de import DELoss
from recbole_rcekd.losses.fce import FCELoss
from recbole_rcekd.losses.fitnet import FitNetLoss
from recbole_rcekd.losses.freqd import FreqDLoss
from recbole_rcekd.losses.ftd import FTDLoss
from recbole_rcekd.losses.hetcomp import HetCompLoss
from recbole_rcekd.losses.htd import HTDLoss
from recbole_rcekd.losses.lambdaloss import LambdaLossLoss
from recbole_rcekd.losses.listmle import ListMLELoss
from recbole_rcekd.losses.rce import RCELoss
from recbole_rcekd.losses.rd import RDLoss
from recbole_rcekd.losses.rrd import RRDLoss
from recbole_rcekd.losses.slk import SLKLoss
from recbole_rcekd.losses.softmax import SoftmaxLoss
from recbole_rcekd.losses.tarec import TARecLoss
from recbole_rcekd.losses.unkd import UnKDLoss
from recbole_rcekd.losses.vkd import VkDLoss
from recbole_rcekd.settings import nearest

LOSSES: dict[str, type[Loss]] = {
    "rce": RCELoss,
    "ce": CELoss,
    "fce": FCELoss,
    "cd": CDLoss,
    "rrd": RRDLoss,
    "listmle": ListMLELoss,
    "softmax": SoftmaxLoss,
    "slk": SLKLoss,
    "rd": RDLoss,
    "ftd": FTDLoss,
    "htd": HTDLoss,
    "freqd": FreqDLoss,
    "dcd": DCDLoss,
    "tarec": TARecLoss,
    "dcd_port": DCDPortLoss,
    "fitnet": FitNetLoss,
    "vkd": VkDLoss,
    "de": DELoss,
    "lambdaloss": LambdaLossLoss,
    "unkd": UnKDLoss,
    "hetcomp": HetCompLoss,
}

__all__ = [
    "LOSSES",
    "CDLoss",
    "CELoss",
    "DELoss",
    "FCELoss",
    "FTDLoss",
    "FeatureLoss",
    "FitNetLoss",
    "FreqDLoss",
    "HTDLoss",
    "HetCompLoss",
    "KDLoss",
    "Loss",
    "RCELoss",
    "RRDLoss",
    "TARecLoss",
    "VkDLoss",
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
