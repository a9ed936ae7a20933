"""Secure aggregation: a sum that the server learns without learning any summand."""

from fedcore.crypto.secagg.client import Client as Client
from fedcore.crypto.secagg.config import Config as Config
from fedcore.crypto.secagg.config import Floors as Floors
from fedcore.crypto.secagg.config import Step as Step
from fedcore.crypto.secagg.errors import Aborted as Aborted
from fedcore.crypto.secagg.errors import Failed as Failed
from fedcore.crypto.secagg.server import Server as Server
