"""Client algorithms: the halves of the server. Those that train lie in `fedcore.client.algorithms`."""

from collections.abc import Mapping

from fedcore.strategies.algorithms.base import BUFFER_BOUND as BUFFER_BOUND
from fedcore.strategies.algorithms.base import Aggregate as Aggregate
from fedcore.strategies.algorithms.base import ClientAlgorithm as ClientAlgorithm
from fedcore.strategies.algorithms.base import LocalSGD as LocalSGD
from fedcore.strategies.algorithms.client_momentum import ClientMomentum as ClientMomentum
from fedcore.strategies.algorithms.ditto import Ditto as Ditto
from fedcore.strategies.algorithms.fedbn import FedBN as FedBN
from fedcore.strategies.algorithms.feddyn import FedDyn as FedDyn
from fedcore.strategies.algorithms.fednova import FedNova as FedNova
from fedcore.strategies.algorithms.fedper import FedPer as FedPer
from fedcore.strategies.algorithms.fedprox import FedProx as FedProx
from fedcore.strategies.algorithms.fedrep import FedRep as FedRep
from fedcore.strategies.algorithms.moon import Moon as Moon
from fedcore.strategies.algorithms.pfedme import PFedMe as PFedMe
from fedcore.strategies.algorithms.qfedavg import QFedAvg as QFedAvg
from fedcore.strategies.algorithms.scaffold import Scaffold as Scaffold

ALGORITHMS: Mapping[str, type[LocalSGD]] = {
    "local_sgd": LocalSGD,
    "client_momentum": ClientMomentum,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "feddyn": FedDyn,
    "qfedavg": QFedAvg,
    "moon": Moon,
    "ditto": Ditto,
    "fedper": FedPer,
    "fedrep": FedRep,
    "fedbn": FedBN,
    "pfedme": PFedMe,
}
