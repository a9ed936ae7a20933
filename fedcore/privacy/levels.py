"""[privacy]: at which level a run is differentially private, and with how much noise.

Exactly one of `noise_multiplier` and `target_epsilon` is given; `fedcore.privacy.claims.resolved` turns the
second into the first, so that whoever trains reads a noise multiplier.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fedcore.tables import Table


class Off(Table):
    """No differential privacy."""

    level: Literal["none"] = "none"


class _Private(Table):
    """What all levels have in common: clip to a norm, add noise, say for which delta."""

    clip_norm: float = Field(1.0, ge=2**-20, le=2**20, description="largest L2 norm of one unit's part")
    noise_multiplier: float = Field(
        0.0, ge=0, le=2**20, description="standard deviation of the noise / clip_norm"
    )
    target_epsilon: float = Field(0.0, ge=0, description="in its place: what the whole run may spend")
    delta: float = Field(1e-5, gt=0, lt=0.1, description="probability that epsilon does not hold")
    metric_noise: float = Field(
        0.0, ge=0, le=2**20, description="noise multiplier of metrics on clients; 0: they are not sent"
    )
    metric_bound: float = Field(1.0, gt=0, le=1024, description="metrics are clipped to 0..metric_bound")

    @model_validator(mode="after")
    def _one_of_the_two(self) -> "_Private":
        if self.noise_multiplier and self.target_epsilon:
            raise ValueError("noise_multiplier and target_epsilon exclude each other; set one of them to 0")
        if not self.noise_multiplier and not self.target_epsilon:
            raise ValueError("give either noise_multiplier or target_epsilon, such as target_epsilon = 3.0")
        return self


class ExampleLevel(_Private):
    """DP-SGD on the device (Abadi et al. 2016): the unit is one example of one client.

    Every step draws each example with probability `sampling_rate`, clips each gradient to `clip_norm`, adds
    N(0, (noise_multiplier clip_norm)^2) to their sum and divides by [client] batch_size. Both are public
    constants, whatever the number of examples on the device.
    """

    level: Literal["example"]
    sampling_rate: float = Field(gt=0, le=1, description="probability of an example to be in a batch")
    clipping: Literal["hooks", "ghost"] = Field("hooks", description="ghost: less memory for large models")
    at_once: int = Field(0, ge=0, description="examples in memory at once; 0: the whole batch")


class ClientLevel(_Private):
    """Gaussian noise in the coordinator on the sum of clipped updates: the unit is one client.

    Each of `population` clients takes part in a round with probability [cohort] size / population; the sum is
    divided by [cohort] size, whoever came (McMahan et al. 2018). adaptive: the clip norm follows the median
    norm of updates (Andrew et al. 2021), and `clip_norm` is the first.
    """

    level: Literal["client"]
    population: int = Field(ge=1, description="registered clients, a public constant")
    adaptive: bool = Field(False, description="let the clip norm follow the median norm of updates")


class TreeLevel(_Private):
    """Tree aggregation in the coordinator (DP-FTRL, Kairouz et al. 2021): the unit is one client.

    For cohorts that cannot be sampled at random: two participations of a client lie at least `separation`
    rounds apart, and no amplification is claimed.
    """

    level: Literal["tree"]
    separation: int = Field(ge=1, description="rounds from one participation of a client to its next")


class LocalLevel(_Private):
    """Noise on the device, on the client's whole update: the unit is one client, against the coordinator.

    laplace: clip_norm is an L1 norm and noise_multiplier the scale of the noise / clip_norm.
    """

    level: Literal["local"]
    noise: Literal["gaussian", "laplace"] = "gaussian"


class DistributedLevel(_Private):
    """A part of the noise on every device, enough in the sum of the honest ones: the unit is one client.

    Against the coordinator too, who sees nothing but sums: [encryption] updates = "secagg". The noise is of
    integers, in as many bits as [encryption] encoding says (Agarwal et al. 2021; Kairouz et al. 2021).
    """

    level: Literal["distributed"]
    noise: Literal["skellam", "discrete_gaussian"] = "skellam"


def _levelled(value: Any) -> Any:
    """Return a table without a level as the one that is off."""
    return {"level": "none", **value} if isinstance(value, dict) else value


OFF = Off()
Private = ExampleLevel | ClientLevel | TreeLevel | LocalLevel | DistributedLevel
Privacy = Annotated[Off | Private, Field(discriminator="level"), BeforeValidator(_levelled)]
