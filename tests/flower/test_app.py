"""A Flower app's folder: what is read of it, and what is said of a folder that is none."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.errors import SpecError, TaskError
from fedcore.flower.app import App

PROJECT = """
[project]
name = "digits"
version = "1.0"
[tool.flwr.app]
publisher = "lab"
[tool.flwr.app.components]
serverapp = "sides_of_test_app:server"
clientapp = "sides_of_test_app:client"
[tool.flwr.app.config]
rounds = 3
lr = 0.1
name = "small"
[tool.flwr.app.config.model]
width = 64
"""
SIDES = "from flwr.serverapp import ServerApp\nserver = ServerApp()\nclient = None\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(PROJECT)
    (tmp_path / "sides_of_test_app.py").write_text(SIDES)
    return tmp_path


def test_an_app_is_read(folder: Path) -> None:
    app = App.read(folder, ["rounds=5 model.width=8", "name='big one'"])
    assert (app.name, app.server, app.client) == (
        "lab/digits",
        "sides_of_test_app:server",
        "sides_of_test_app:client",
    )
    assert app.config == {"rounds": 5, "lr": 0.1, "name": "big one", "model.width": 8}
    assert app.overrides == {"rounds": 5, "model.width": 8, "name": "big one"}


def test_overrides_may_be_a_file(folder: Path) -> None:
    (folder / "other.toml").write_text("rounds = 7\n[model]\nwidth = 1\n")
    assert App.read(folder, [str(folder / "other.toml")]).overrides == {"rounds": 7, "model.width": 1}


def changed(text: str, other: str) -> Callable[[str], str]:
    return lambda project: project.replace(text, other)


def without(text: str) -> Callable[[str], str]:
    return changed(text, "")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without(PROJECT), "Missing [project] section"),
        (without('[tool.flwr.app]\npublisher = "lab"'), 'Property "publisher" missing in [tool.flwr.app]'),
        (without("[tool.flwr.app.components]"), "Missing [tool.flwr.app.components] section"),
        (without('clientapp = "sides_of_test_app:client"'), 'Property "clientapp" missing'),
        (changed("serverapp =", "agentapp ="), "[tool.flwr.app.components] has no serverapp"),
        (without(":server"), "serverapp = 'sides_of_test_app': expected \"module:object\""),
        (changed("sides_of_test_app:c", "nowhere:c"), "there is no module 'nowhere' in"),
        (changed("0.1", "[0.1]"), "key lr needs to be of type"),
        (changed("[project]", "[project"), "Expected ']'"),
    ],
)
def test_what_is_no_app_is_refused(folder: Path, change: Callable[[str], str], said: str) -> None:
    (folder / "pyproject.toml").write_text(change(PROJECT))
    with pytest.raises(TaskError, match=re.escape(said)) as caught:
        App.read(folder)
    assert str(folder / "pyproject.toml") in str(caught.value)


def test_a_folder_without_a_project_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no such file; name the folder of a Flower app"):
        App.read(tmp_path)
    with pytest.raises(TaskError, match="no such file"):
        App.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("round=5", "has no such key in [tool.flwr.app.config]; did you mean 'rounds'?"),
        ("lr", "--run-config 'lr': expected 'key=value key2=value2'"),
        ("name=big", "with text in quotes"),
        ("nowhere.toml", "No such file"),
        ("lr=[1]", "key lr needs to be of type"),
    ],
)
def test_an_override_that_does_not_fit_is_refused(folder: Path, override: str, said: str) -> None:
    with pytest.raises(SpecError, match=re.escape(said)):
        App.read(folder, [override])


def test_the_server_side_is_imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [*sys.path])
    app = App.read(folder)
    assert type(app.load_server()).__name__ == "ServerApp"
    with pytest.raises(TaskError, match="client' is a NoneType, expected a flwr"):
        App(folder, app.name, app.client, app.client).load_server()
    with pytest.raises(TaskError, match="attribute nothing from module sides_of_test_app; correct"):
        App(folder, app.name, "sides_of_test_app:nothing", app.client).load_server()
    (folder / "lacking_of_test_app.py").write_text("import nothing_of_the_kind\n")
    with pytest.raises(TaskError, match=r"no module 'nothing_of_the_kind'; install what the app needs"):
        App(folder, app.name, "lacking_of_test_app:app", app.client).load_server()


def test_the_digest_covers_code_and_project_and_nothing_else(folder: Path) -> None:
    before = App.read(folder, ["rounds=9"]).digest
    (folder / "data.csv").write_text("1")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "library.py").write_text("")
    assert App.read(folder).digest == before
    (folder / "pyproject.toml").write_text(PROJECT.replace("0.1", "0.2"))
    changed = App.read(folder).digest
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "more").mkdir()
    (folder / "more" / "layers.py").write_text("")
    assert len({before, changed, App.read(folder).digest}) == 3
