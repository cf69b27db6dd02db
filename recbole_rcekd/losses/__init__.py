"""The distillation losses: the formula of each method, and the candidates that it learns on.

Nothing here imports RecBole, so a loss can be used with any two tensors. To add one, see
``CONTRIBUTING.md``: a file here, a line in ``LOSSES``, a yaml file, tests and an entry in
``METHODS.md``.
"""

from __future__ import annotations

from recbole_rcekd.losses.base import EmbeddingLoss, KDLoss, Loss
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
from recbole_rcekd.losses.srce import SRCELoss
from recbole_rcekd.losses.tarec import TARecLoss
from recbole_rcekd.losses.unkd import UnKDLoss
from recbole_rcekd.losses.vkd import VkDLoss

# In the order of the README: on scores with closed item sets, on scores with other item sets, on
# embeddings, and a control.
LOSSES: dict[str, type[Loss]] = {
    "rce": RCELoss,
    "srce": SRCELoss,
    "fce": FCELoss,
    "slk": SLKLoss,
    "ce": CELoss,
    "cd": CDLoss,
    "rd": RDLoss,
    "rrd": RRDLoss,
    "dcd": DCDLoss,
    "dcd_port": DCDPortLoss,
    "unkd": UnKDLoss,
    "hetcomp": HetCompLoss,
    "listmle": ListMLELoss,
    "lambdaloss": LambdaLossLoss,
    "tarec": TARecLoss,
    "fitnet": FitNetLoss,
    "vkd": VkDLoss,
    "de": DELoss,
    "ftd": FTDLoss,
    "htd": HTDLoss,
    "freqd": FreqDLoss,
    "softmax": SoftmaxLoss,
}

__all__ = [
    "LOSSES",
    "CDLoss",
    "CELoss",
    "DCDLoss",
    "DCDPortLoss",
    "DELoss",
    "EmbeddingLoss",
    "FCELoss",
    "FTDLoss",
    "FitNetLoss",
    "FreqDLoss",
    "HTDLoss",
    "HetCompLoss",
    "KDLoss",
    "LambdaLossLoss",
    "ListMLELoss",
    "Loss",
    "RCELoss",
    "RDLoss",
    "RRDLoss",
    "SLKLoss",
    "SRCELoss",
    "SoftmaxLoss",
    "TARecLoss",
    "UnKDLoss",
    "VkDLoss",
]
