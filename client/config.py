"""agent.toml: what the owner of a device allows on it."""

import sys
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from fedcore.crypto.files import write_atomically
from fedcore.errors import ConfigError, SpecError
from fedcore.privacy.events import Unit
from fedcore.tables import Labels, Table, explain, line_of
from fedcore.wire.address import parse_address

FILE = "agent.toml"
Encryption = Literal["tls", "sealed", "secagg"]
STRENGTHS: tuple[Encryption, ...] = get_args(Encryption)  # the weakest first
SIZE = r"^$|^[1-9]\d*[MG]iB$"
UNHEARD = ("smallest_cohort", "encryption", "largest_weight", "rounds_per_day")  # which an app goes around
HOURS = r"^$|^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$"


class Terms(Table):
    """[policy]: what an assignment must keep to."""

    smallest_cohort: int = Field(1, ge=1, description="clients that must take part in a round")
    encryption: Encryption = Field("tls", description="the weakest that is accepted for updates")
    corrupt: float = Field(
        0.1, ge=0, lt=1 / 3, description="secagg: share of the clients that may collude, at least"
    )
    largest_weight: float = Field(0.0, ge=0, description="most examples a client may count for; 0: any")
    hours: str = Field("", pattern=HOURS, description="HH:MM-HH:MM, local time, such as 22:00-06:00")
    rounds_per_day: int = Field(0, ge=0, description="starts of training in 24 hours; 0: any number")


class Limits(Table):
    """[worker]: what the training process may take."""

    memory: str = Field("", pattern=SIZE, description="most memory, such as 4GiB; empty: any amount")

    @field_validator("memory")
    @classmethod
    def _can_be_seen(cls, memory: str) -> str:
        if memory and sys.platform != "linux":
            raise ValueError("expected nothing here, for only Linux says what a process group holds")
        return memory


class LedgerTerms(Table):
    """[ledger]: what may ever be done to the data set, by everybody together."""

    path: str = Field("", description="file, relative to agent.toml; empty: none is kept")
    dataset: str = Field("", description="the owner's name of the data, the same for as long as they live")
    unit: Unit = Field("example", description="what is protected: one example, or this client as a whole")
    epsilon: float = Field(0.0, ge=0, description="most that is spent in the data set's life")
    delta: float = Field(1e-5, gt=0, lt=0.1, description="probability that epsilon does not hold")
    accept_trusted: bool = Field(False, description="take a coordinator's word that it adds noise")

    @model_validator(mode="after")
    def _is_whole(self) -> "LedgerTerms":
        if self.path and not (self.dataset and self.epsilon):
            raise ValueError('path needs dataset and epsilon beside it, such as "clinic-a" and 8.0')
        return self


class Flower(Table):
    """[flower]: which apps of Flower may run here. What they send is between their two sides."""

    apps: dict[str, str] = Field({}, description='"publisher/name" = folder, relative to agent.toml')
    node: dict[str, bool | int | float | str] = Field({}, description="handed to the app as its node config")


class Settings(Table):
    """The whole file."""

    coordinator: str = Field("", description="HOST:PORT")
    state: str = Field("state", min_length=1, description="folder, relative to the file's")
    evaluator: bool = Field(False, description="hold Task.holdout() and Task.root() instead of [data]")
    labels: Labels = Field({}, description='what runs may choose devices by, such as {site = "eu"}')
    tasks: dict[str, str] = Field({}, description='name on the wire = "module:object"')
    data: dict[str, JsonValue] = Field({}, description="handed to the task as client.options")
    policy: Terms = Terms()
    worker: Limits = Limits()
    ledger: LedgerTerms = LedgerTerms()
    flower: Flower = Flower()

    @field_validator("coordinator")
    @classmethod
    def _is_an_address(cls, address: str) -> str:
        try:
            return parse_address(address) if address else address
        except SpecError as error:
            raise ValueError("expected HOST:PORT, such as federation.example.org:8710") from error


@dataclass(frozen=True)
class Config:
    """An agent's folder and its settings; `text` is the file's, for the lines that refusals name."""

    folder: Path
    settings: Settings
    text: str = ""

    @classmethod
    def load(cls, folder: Path) -> "Config":
        """Read the folder's agent.toml; raises ConfigError that names the line and the nearest valid key."""
        path = folder / FILE
        try:
            text = path.read_text(encoding="utf-8")
            return cls(folder.resolve(), Settings.model_validate(tomllib.loads(text)), text)
        except ValidationError as error:
            lines = [explain(Settings, problem, str(path), text) for problem in error.errors()]
            raise ConfigError("\n".join(lines)) from error
        except OSError as error:
            hint = "'fedcore client init DIR' writes one"
            raise ConfigError(f"{path}: {error.strerror}; expected an agent's settings, {hint}") from error
        except ValueError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}") from error

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.folder / self.settings.state

    @property
    def ledger(self) -> Path | None:
        """The file of the data set's ledger, None where none is kept.

        Raises ConfigError where it would go with an agent's state, or where the data are the operator's.
        """
        if not self.settings.ledger.path:
            return None
        path = (self.folder / Path(self.settings.ledger.path).expanduser()).resolve()
        if path.is_relative_to(self.state.resolve()):
            raise ConfigError(
                f"{self.place('ledger', 'path')}: {path} lies in the agent's state; expected a folder that "
                "outlives every agent of these data"
            )
        if self.settings.evaluator:
            raise ConfigError(
                f"{self.place('ledger', 'path')}: an evaluator holds the operator's data, which have no "
                "ledger; remove [ledger], or set evaluator = false"
            )
        return path

    @property
    def apps(self) -> dict[str, Path]:
        """The folder of each app of Flower that may run here, by `publisher/name`.

        Raises ConfigError where the file also promises what no app can be held to, for its messages say
        what it likes.
        """
        apps, settings, usual = self.settings.flower.apps, self.settings, Terms()
        given: dict[tuple[str, ...], object] = {("ledger", "path"): settings.ledger.path}
        given |= {("policy", key): getattr(settings.policy, key) != getattr(usual, key) for key in UNHEARD}
        given[("evaluator",)] = settings.evaluator
        if promise := next(filter(given.get, given), None) if apps else None:
            raise ConfigError(
                f"{self.place(*promise)}: it cannot be kept for the apps of [flower], whose messages are not "
                "looked into; remove one of the two, or run two agents, each with its own data"
            )
        return {name: (self.folder / Path(path).expanduser()).resolve() for name, path in apps.items()}

    def place(self, *keys: str) -> str:
        """Return where a key, or else its table, stands: `agent.toml:14: policy.smallest_cohort`."""
        line = line_of(self.text, list(keys))
        return f"{FILE}:{line}: {'.'.join(keys)}" if line else f"{FILE}: {'.'.join(keys)}"


def write_template(folder: Path, coordinator: str = "") -> Path:
    """Write a commented agent.toml into a folder; raises ConfigError where there is one."""
    path = folder / FILE
    if path.exists():
        raise ConfigError(f"{path} already exists; edit it, or choose another folder")
    text = (files("fedcore") / "templates" / FILE).read_text(encoding="utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    line = f'coordinator = "{parse_address(coordinator) if coordinator else ""}"'
    write_atomically(path, text.replace('coordinator = ""', line, 1).encode(), 0o644)
    return path
