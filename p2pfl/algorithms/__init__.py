"""Rules of decentralised learning, each a pure function of tensors."""

from __future__ import annotations

from collections.abc import Callable

from p2pfl.algorithms.aggregators import Aggregator, WeightedMean, flow
from p2pfl.algorithms.base import Algorithm, Compressor, Context, Notice, Requirement, State
from p2pfl.algorithms.compressed import Choco, PowerGossip
from p2pfl.algorithms.gossip import ADPSGD, DPSGD, EXTRA, AllReduce, Chebyshev, DFedAvgM, DiLoCo, ExactDiffusion, QGDSGDm
from p2pfl.algorithms.guard import Guard
from p2pfl.algorithms.inbox import Channel, Inbox, InboxFactory, over_an_edge
from p2pfl.algorithms.personal import PartlyShared
from p2pfl.algorithms.quantizers import QSGD, BFloat16, Float16, Identity, Int8, Sign
from p2pfl.algorithms.sparsifiers import LowRank, RandomK, TopK
from p2pfl.algorithms.sums import PushSum, RelaySGD
from p2pfl.algorithms.tracking import KGT, GradientTracking

ALGORITHMS: dict[str, type[Algorithm]] = {
    "dpsgd": DPSGD,
    "allreduce": AllReduce,
    "ad-psgd": ADPSGD,
    "dfedavgm": DFedAvgM,
    "qg-dsgdm": QGDSGDm,
    "gradient-tracking": GradientTracking,
    "k-gt": KGT,
    "exact-diffusion": ExactDiffusion,
    "extra": EXTRA,
    "push-sum": PushSum,
    "relaysgd": RelaySGD,
    "diloco": DiLoCo,
    "chebyshev": Chebyshev,
    "choco": Choco,
    "powergossip": PowerGossip,
}

COMPRESSORS: dict[str, Callable[..., Compressor]] = {
    "none": Identity,
    "fp16": Float16,
    "bf16": BFloat16,
    "int8": Int8,
    "qsgd": QSGD,
    "sign": Sign,
    "top-k": TopK,
    "random-k": RandomK,
    "low-rank": LowRank,
}

AGGREGATORS: dict[str, type[Aggregator]] = {"mean": WeightedMean}

__all__ = [
    "ADPSGD",
    "AGGREGATORS",
    "ALGORITHMS",
    "COMPRESSORS",
    "DPSGD",
    "KGT",
    "Aggregator",
    "Algorithm",
    "AllReduce",
    "Channel",
    "Choco",
    "Compressor",
    "Context",
    "GradientTracking",
    "Guard",
    "Inbox",
    "InboxFactory",
    "Notice",
    "PartlyShared",
    "QGDSGDm",
    "Requirement",
    "State",
    "flow",
    "over_an_edge",
]
