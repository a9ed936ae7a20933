"""The run spec: one TOML file that says all there is to say about a run.

The same file drives a simulation, a simulation on many machines and a deployed federation. Every field
has a default; an unknown key, a wrong type or a value out of range is a SpecError that names the line.
"""

from collections.abc import Iterable, Mapping
from math import ceil, cos, pi
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fedcore.errors import SpecError
from fedcore.privacy.levels import OFF, Privacy
from fedcore.tables import Labels, Table, assign, explain, literal, read_toml


def _part(value: Any) -> Any:
    """Return the table of a part that is written as a name alone."""
    return {"name": value} if isinstance(value, str) else value


# {name = "...", field = value}, resolved by `fedcore.plugins.build`.
Part = Annotated[dict[str, Any], BeforeValidator(_part)]
Attack = Annotated[Part, BeforeValidator(lambda value: {} if value == "none" else value)]


class Run(Table):
    """[run]: what is run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="up to 63 letters, digits, . _ -"
    )
    task: str = Field("", description='"module:object" of a fedcore.Task')
    rounds: int = Field(10, ge=1, le=10**6, description="rounds of training")
    seed: int = Field(0, ge=0, lt=2**63, description="of the model, the cohorts and the batches")


class Cohort(Table):
    """[cohort]: who takes part in a round."""

    size: int = Field(10, ge=1, le=10**6, description="updates that close a round")
    minimum: int = Field(0, ge=0, description="fewest updates at the deadline; 0: two thirds of size")
    over_select: float = Field(1.0, ge=1.0, le=10.0, description="deployed: clients asked / size")
    deadline: float = Field(600.0, gt=0, le=7 * 86400, description="seconds of a round, deployed")
    labels: Labels = Field({}, description='deployed: what agents must have, such as {site = "eu"}')

    @property
    def fewest(self) -> int:
        """The smallest number of updates with which a round may close."""
        return min(self.minimum, self.size) if self.minimum else -(-2 * self.size // 3)

    @property
    def asked(self) -> int:
        """How many clients a round asks, so that `size` of them answer in time."""
        return ceil(round(self.size * self.over_select, 6))  # 25 * 2.2 is 55.00000000000001


Beta = Annotated[float, Field(ge=0, lt=1)]


class SGD(Table):
    """Stochastic gradient descent on the client."""

    name: Literal["sgd"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true needs momentum > 0, such as momentum = 0.9")
        return self


class Adam(Table):
    """Adam or AdamW on the client."""

    name: Literal["adam", "adamw"]
    lr: float = Field(0.001, gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False)  # TOML has lists, no tuples
    weight_decay: float = Field(0.0, ge=0)


def _named(value: Any) -> Any:
    """Return an optimiser's table with the name that it has by default, on which its type hangs."""
    return {"name": "sgd", **value} if isinstance(value, Mapping) else value


Optimizer = Annotated[SGD | Adam, Field(discriminator="name"), BeforeValidator(_named)]


class Constant(Table):
    """The optimiser's learning rate in every round."""

    name: Literal["constant"] = "constant"
    warmup: int = Field(0, ge=0, description="rounds before, in which the rate grows linearly")


class Cosine(Table):
    """Half a cosine, from the optimiser's rate to `floor` times it (Loshchilov and Hutter 2017)."""

    name: Literal["cosine"]
    warmup: int = Field(0, ge=0, description="rounds before, in which the rate grows linearly")
    floor: float = Field(0.0, ge=0, lt=1, description="of the rate, after the last round")


class Decay(Table):
    """The optimiser's rate, times `gamma` after every so many rounds."""

    name: Literal["step"]
    warmup: int = Field(0, ge=0, description="rounds before, in which the rate grows linearly")
    every: int = Field(ge=1, description="rounds between two steps")
    gamma: float = Field(0.1, gt=0, le=1)


def _scheduled(value: Any) -> Any:
    """Return a schedule's table with its name, which may stand alone and is constant by default."""
    value = _part(value)
    return {"name": "constant", **value} if isinstance(value, Mapping) else value


Schedule = Annotated[Constant | Cosine | Decay, Field(discriminator="name"), BeforeValidator(_scheduled)]


class Client(Table):
    """[client]: how a client trains."""

    epochs: int = Field(1, ge=1, description="passes over the client's examples")
    steps: int = Field(0, ge=0, description="at most so many batches of one epoch; 0: all")
    batch_size: int = Field(32, ge=1)
    shuffle: bool = Field(True, description="a new order each epoch, from (seed, round, client)")
    optimizer: Optimizer = SGD()
    schedule: Schedule = Constant()
    device: str = Field("cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    threads: int = Field(1, ge=1, le=1024, description="torch threads; one gives the same bits everywhere")
    autocast: bool = Field(False, description="compute in bfloat16 where torch holds it safe; weights stay")

    @model_validator(mode="after")
    def _steps_are_of_one_epoch(self) -> "Client":
        if self.steps and self.epochs != 1:
            raise ValueError(f"steps = {self.steps} cuts one epoch short; set epochs = 1, not {self.epochs}")
        return self

    def passes(self, examples: int) -> float:
        """Return how often a round goes over so many examples; less than once where `steps` ends it early."""
        seen = min(examples, self.steps * self.batch_size) if self.steps else examples
        return self.epochs * seen / examples if examples else 0.0


class Limits(Table):
    """[limits]: what is accepted from a client; the fixed-point grid follows from them."""

    weight: float = Field(1e6, ge=1, le=2**40, description="largest weight of a client, in examples")
    update: float = Field(64.0, ge=2**-40, le=2**40, description="largest |coordinate| of an update")
    norm: float = Field(
        0.0, ge=0, le=2**40, description="L2 norm to which an update is scaled down; 0: as it is"
    )


class Evaluation(Table):
    """[evaluation]: when and where the model is tested."""

    every: int = Field(1, ge=0, description="rounds between evaluations; 0: after the last only")
    where: Literal["clients", "holdout"] = Field("clients", description="on Split.test, or Task.holdout()")
    patience: int = Field(
        0, ge=0, description="end the run after so many evaluations without improvement; 0: never"
    )
    monitor: str = Field("loss", description="what has to improve: the loss, which falls, or a metric")

    @model_validator(mode="after")
    def _patience_counts_evaluations(self) -> "Evaluation":
        if self.patience and not self.every:
            raise ValueError(f"patience = {self.patience} counts evaluations; set every >= 1, not 0")
        return self


class Encryption(Table):
    """[encryption]: how updates travel."""

    updates: Literal["auto", "secagg", "sealed", "tls"] = Field(
        "auto", description="secagg: the coordinator sees the sum alone; sealed: nobody between and no disk"
    )
    encoding: Literal["auto", "exact", "q32", "q16"] = Field(
        "auto", description="64, 32 or 16 bits a number in sums; the latter need limits.norm or a clip norm"
    )
    corrupt: float = Field(
        0.2, ge=0, lt=1 / 3, description="secagg: share of a cohort that may collude with the coordinator"
    )
    lost: float = Field(0.1, ge=0, lt=1 / 3, description="secagg: share of a cohort that may drop out")


class Simulation(Table):
    """[simulation]: read by simulations only."""

    clients: int = Field(100, ge=1, description="size of the population")
    partition: Part = Field({"name": "iid"}, description="how Task.dataset() is cut")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="of each client's examples, for its test split")
    engine: Literal["auto", "sequential", "vectorized", "processes", "ray"] = Field(
        "auto", description="auto: the fastest one, measured on the task"
    )
    chunk: int = Field(0, ge=0, le=10**5, description="clients trained at once; 0: measured")
    workers: int = Field(
        0, ge=0, le=1024, description="processes, or threads of the vectorised engine; 0: measured"
    )
    speed: Part = Field({"name": "constant"}, description="virtual seconds that clients take for an example")


class RunSpec(Table):
    """A run, complete. Read one with `RunSpec.load`, or build it from keyword tables."""

    run: Run = Run()
    cohort: Cohort = Cohort()
    client: Client = Client()
    strategy: Part = Field({"name": "fedavg"})
    limits: Limits = Limits()
    evaluation: Evaluation = Evaluation()
    encryption: Encryption = Encryption()
    privacy: Privacy = OFF
    simulation: Simulation = Simulation()
    attack: Attack = Field({}, description="simulated: what malicious clients do, as {name, fraction, first}")

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> "RunSpec":
        """Read a TOML file and apply `key=value` overrides such as `run.rounds=3`.

        Raises SpecError that names the file, the line, what was expected and the nearest valid name.
        """
        try:
            text, table = read_toml(Path(path))
        except OSError as error:
            reason = f"{error.strerror}; expected a run spec, `fedcore new DIR` writes one"
            raise SpecError(f"{path}: {reason}") from error
        except ValueError as error:
            raise SpecError(f"{path}: {error}") from error
        return cls.parse(table, overrides, str(path), text)

    @classmethod
    def parse(
        cls, table: dict[str, Any], overrides: Iterable[str] = (), source: str = "spec", text: str = ""
    ) -> "RunSpec":
        """Check a table with overrides applied; `text` is the TOML it came from, for line numbers."""
        overridden = [_override(table, item) for item in overrides]
        try:
            return cls.model_validate(table)
        except ValidationError as error:
            lines = [explain(cls, problem, source, text, overridden) for problem in error.errors()]
            raise SpecError("\n".join(lines)) from error

    def with_(self, *overrides: str) -> "RunSpec":
        """Return a copy with `key=value` overrides applied."""
        return RunSpec.parse(self.model_dump(), overrides)

    def at(self, round: int) -> "RunSpec":
        """Return the spec of a round, from 1: the learning rate of its clients is the schedule's."""
        factor = _factor(self.client.schedule, round, self.run.rounds)
        if factor == 1:
            return self
        optimizer = self.client.optimizer.model_copy(update={"lr": self.client.optimizer.lr * factor})
        return self.model_copy(update={"client": self.client.model_copy(update={"optimizer": optimizer})})

    def travels(self) -> str:
        """Return the spec as JSON without [simulation]: what devices get, and what they are bound to."""
        return self.model_dump_json(exclude={"simulation"})

    def to_toml(self) -> str:
        """Return the whole spec, defaults written out."""
        return tomli_w.dumps(self.model_dump(mode="json"))


def _factor(schedule: Constant | Cosine | Decay, round: int, rounds: int) -> float:
    """Return by what a schedule multiplies the learning rate in a round, from 1, of so many."""
    past = round - 1 - schedule.warmup
    if past < 0:
        return round / (schedule.warmup + 1)
    match schedule:
        case Cosine(floor=floor):
            share = min(1.0, past / max(1, rounds - schedule.warmup))
            return floor + (1 - floor) * (1 + cos(pi * share)) / 2
        case Decay(every=every, gamma=gamma):
            return gamma ** (past // every)
        case Constant():
            return 1.0


def _override(table: dict[str, Any], item: str) -> str:
    """Set one `a.b.c=value` in place and return its key path; the value is TOML, or else a plain string."""
    path, equals, value = item.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise SpecError(f"--set {item!r}: expected key=value, such as run.rounds=3")
    assign(table, path, literal(value))
    return path
