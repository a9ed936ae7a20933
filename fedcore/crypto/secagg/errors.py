"""How secure aggregation ends early."""

from fedcore.errors import FedcoreError, UpdateRefused


class Aborted(UpdateRefused):
    """A client has stopped: what the coordinator said does not hold, or asks for less than is safe."""


class Failed(FedcoreError):
    """The coordinator cannot finish an attempt: too few clients are left. It has learned nothing."""
