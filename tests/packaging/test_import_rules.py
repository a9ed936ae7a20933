"""The import contracts of pyproject.toml fail when they should: each case breaks one in a copy."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # together more than ten seconds

LINT = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]


def _lint(copy: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(LINT, cwd=copy, capture_output=True, text=True)


@pytest.fixture
def copy(root: Path, files: list[str], tmp_path: Path) -> Path:
    """Return a copy of the code without the tests."""
    for path in files:
        if path == "pyproject.toml" or (path.endswith(".py") and not path.startswith("tests/")):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, tmp_path / path)
    for link in (path for path in (root / "fedcore").iterdir() if path.is_symlink()):
        (tmp_path / "fedcore" / link.name).symlink_to(link.readlink())
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("fedcore/errors.py", "import fedcore.server"),
        ("fedcore/errors.py", "from fedcore import strategies"),
        ("fedcore/errors.py", "from fedcore.cli import main"),
        ("fedcore/errors.py", "from fedcore import simulate"),
        ("strategies/__init__.py", "import fedcore.client"),
        ("strategies/__init__.py", "import torch"),
        ("client/__init__.py", "import fedcore.simulations"),
        ("server/__init__.py", "import fedcore.client"),
        ("server/__init__.py", "import fedcore.simulations"),
        ("server/__init__.py", "def late():\n    import torch"),
        ("simulations/__init__.py", "import fedcore.server"),
        ("fedcore/nobody_placed_me.py", ""),
    ],
)
def test_a_wrong_import_breaks_the_contract(copy: Path, module: str, line: str) -> None:
    (copy / "fedcore" / "cli.py").touch()
    with (copy / module).open("a") as file:
        file.write(f"\n{line}\n")
    assert _lint(copy).returncode == 1


def test_simulations_may_import_the_client(copy: Path) -> None:
    with (copy / "simulations" / "__init__.py").open("a") as file:
        file.write("\nimport fedcore.client\n")
    linted = _lint(copy)
    assert linted.returncode == 0, linted.stdout
