"""How the updates of a cohort become one direction: one rule, or one family, a file."""

from collections.abc import Mapping

from fedcore.strategies.aggregators.base import Aggregator as Aggregator
from fedcore.strategies.aggregators.base import ColumnRule as ColumnRule
from fedcore.strategies.aggregators.base import GramRule as GramRule
from fedcore.strategies.aggregators.base import RowRule as RowRule
from fedcore.strategies.aggregators.centered_clipping import CenteredClipping as CenteredClipping
from fedcore.strategies.aggregators.cge import CGE as CGE
from fedcore.strategies.aggregators.coordinatewise import MeaMed as MeaMed
from fedcore.strategies.aggregators.coordinatewise import Median as Median
from fedcore.strategies.aggregators.coordinatewise import TrimmedMean as TrimmedMean
from fedcore.strategies.aggregators.dnc import DnC as DnC
from fedcore.strategies.aggregators.fltrust import FLTrust as FLTrust
from fedcore.strategies.aggregators.geometric_median import GeometricMedian as GeometricMedian
from fedcore.strategies.aggregators.krum import Bulyan as Bulyan
from fedcore.strategies.aggregators.krum import Krum as Krum
from fedcore.strategies.aggregators.krum import MultiKrum as MultiKrum
from fedcore.strategies.aggregators.mean import Mean as Mean

AGGREGATORS: Mapping[str, type[Aggregator]] = {
    "mean": Mean,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "meamed": MeaMed,
    "krum": Krum,
    "multi_krum": MultiKrum,
    "bulyan": Bulyan,
    "geometric_median": GeometricMedian,
    "centered_clipping": CenteredClipping,
    "cge": CGE,
    "dnc": DnC,
    "fltrust": FLTrust,
}
