"""A Flower app: the folder whose pyproject.toml says where its two sides are, and its run config."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import click
from flwr.app.user_config import UserConfigValue
from flwr.common.config import flatten_dict, get_project_config, parse_config_args
from flwr.serverapp import ServerApp
from flwr.supercore import object_ref

from fedcore.errors import SpecError, TaskError, nearest
from fedcore.task import files_digest

PROJECT = "pyproject.toml"


@dataclass(frozen=True)
class App:
    """A Flower app as it is run.

    folder: absolute. name: `publisher/name`, by which devices allow it. server, client: `module:object`.
    config: the run config, with the overrides in it. overrides: what --run-config changed of it.
    """

    folder: Path
    name: str
    server: str
    client: str
    config: Mapping[str, UserConfigValue] = field(default_factory=dict)
    overrides: Mapping[str, UserConfigValue] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, overrides: Sequence[str] = ()) -> "App":
        """Read the app in a folder; nothing of it is imported.

        overrides: `key=value key2=value2` as `flwr run --run-config` takes them, or the path of a TOML file.
        Raises TaskError where it is no app, and SpecError for an override that does not fit it.
        """
        folder = folder.absolute()
        file = folder / PROJECT
        try:
            project = get_project_config(folder)
            app = project["tool"]["flwr"]["app"]
            server, client = (str(app["components"][key]) for key in ("serverapp", "clientapp"))
            config = flatten_dict(app.get("config"))
        except OSError as error:
            reason = error.strerror or "no such file"
            raise TaskError(
                f"{file}: {reason}; name the folder of a Flower app, as 'flwr new' makes"
            ) from error
        except KeyError as error:
            raise TaskError(
                f'{file}: [tool.flwr.app.components] has no {error.args[0]}; expected "module:object"'
            ) from error
        except ValueError as error:  # of TOML, or Flower's own: which key of which section is missing
            raise TaskError(f"{file}: {error}") from error
        for key, reference in {"serverapp": server, "clientapp": client}.items():
            _check(folder, key, reference)
        changed = _parsed(overrides)
        for key in changed.keys() - config.keys():
            hint = nearest(key, config) if config else "; it has none"
            raise SpecError(f"--run-config {key}: {file} has no such key in [tool.flwr.app.config]{hint}")
        name = f"{app['publisher']}/{project['project']['name']}"
        return cls(folder, name, server, client, {**config, **changed}, changed)

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted (path, SHA-256) of the app's Python files and its pyproject.toml, in hex.

        Folders whose names begin with a dot, such as .venv, are not the app's.
        """
        return files_digest(self.folder, _files(self.folder))

    def load_server(self) -> ServerApp:
        """Import the ServerApp as Flower does; raises TaskError where there is none.

        What the app's own code raises while it is imported is left as it is.
        """
        try:
            found = object_ref.load_app(self.server, TaskError, self.folder)
        except TaskError as error:  # in Flower's words, and a page on what a reference is
            reason = str(error).partition("\n")[0]
            raise TaskError(f"{reason}; correct serverapp in {self.folder / PROJECT}") from error
        except ModuleNotFoundError as error:
            raise TaskError(
                f"{self.name}: importing {self.server!r}: no module {error.name!r}; "
                f"install what the app needs: pip install -e {self.folder}"
            ) from error
        if not isinstance(found, ServerApp):
            kind = type(found).__name__
            raise TaskError(f"{self.name}: {self.server!r} is a {kind}, expected a flwr.serverapp.ServerApp")
        return found


def _check(folder: Path, key: str, reference: str) -> None:
    """Raise TaskError unless a component reads "module:object", with a module that is there."""
    module, _, attribute = reference.partition(":")
    top = module.partition(".")[0]
    where = f"{folder / PROJECT}: {key} = {reference!r}"
    if not top or not attribute:
        raise TaskError(f'{where}: expected "module:object", such as "my_app.client_app:app"')
    if not ((folder / top).is_dir() or (folder / f"{top}.py").is_file() or find_spec(top)):
        raise TaskError(f"{where}: there is no module {top!r} in {folder} or among the installed")


def _parsed(overrides: Sequence[str]) -> dict[str, UserConfigValue]:
    """Return overrides as Flower reads them; raises SpecError."""
    form = "expected 'key=value key2=value2', with text in quotes, as 'lr=0.1 name=\"small\"', or a TOML file"
    for text in overrides:
        if "=" not in text and not text.endswith(".toml"):  # which Flower takes for no override at all
            raise SpecError(f"--run-config {text!r}: {form}")
    try:
        return parse_config_args(list(overrides))
    except (ValueError, OSError, click.ClickException) as error:
        raise SpecError(f"--run-config {' '.join(overrides)!r}: {error}; {form}") from error


def _files(folder: Path) -> Iterator[Path]:
    for path in (*folder.rglob("*.py"), folder / PROJECT):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts[:-1]):
            yield path
