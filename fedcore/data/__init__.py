"""Examples as arrays, ways to divide them among clients, and the data sets of the examples."""

from fedcore.data.arrays import ArrayDataset as ArrayDataset
from fedcore.data.arrays import Split as Split
from fedcore.data.arrays import load_split as load_split
from fedcore.data.arrays import save_split as save_split
from fedcore.data.datasets import ALPHABET as ALPHABET
from fedcore.data.datasets import DATASETS as DATASETS
from fedcore.data.datasets import digits as digits
from fedcore.data.datasets import mnist as mnist
from fedcore.data.datasets import shakespeare as shakespeare
from fedcore.data.partitions import PARTITIONS as PARTITIONS
from fedcore.data.partitions import Dirichlet as Dirichlet
from fedcore.data.partitions import Iid as Iid
from fedcore.data.partitions import Natural as Natural
from fedcore.data.partitions import Partition as Partition
from fedcore.data.partitions import QuantitySkew as QuantitySkew
from fedcore.data.partitions import Shards as Shards
