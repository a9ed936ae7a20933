"""Settings that every test shares, and the databases that the coordinator's tests run on."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

# One thread a process, before anything imports torch: on busy cores, threads that share small operations wait
# for each other far longer than they compute, a hundred times in the worst case seen.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

# No deadline: two busy cores say nothing about the code. On CI the same examples each time, so that a red run
# is a change's fault and not luck's; at home new ones, so that luck may find something.
settings.register_profile("fedcore", deadline=None, max_examples=50, derandomize="CI" in os.environ)
settings.load_profile("fedcore")

NUMBERS = count()


def pytest_addoption(parser: pytest.Parser) -> None:
    said = "run the tests of the coordinator's database on PostgreSQL too, on a server that they start"
    parser.addoption("--postgres", action="store_true", help=said)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name == "test_postgres.py" and not config.getoption("--postgres") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "database_url" in metafunc.fixturenames:
        both = ["sqlite", "postgres"] if metafunc.config.getoption("--postgres") else ["sqlite"]
        metafunc.parametrize("database_url", both, indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest) -> str:
    """Return the URL of a new database, "" for the SQLite file of a coordinator's folder."""
    return "" if request.param == "sqlite" else str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def postgres_url(cluster: tuple[Path, Path, str]) -> str:
    """Return the URL of a new database on PostgreSQL."""
    bin, socket, user = cluster
    name = f"test_{next(NUMBERS)}"
    subprocess.run([bin / "createdb", "-h", socket, "-U", user, name], check=True)
    return f"postgresql+psycopg://{user}@/{name}?host={socket}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[tuple[Path, Path, str]]:
    """Start a PostgreSQL server; return the folders of its programs and of its socket, and its user."""
    found = shutil.which("initdb") or max(Path("/usr/lib/postgresql").glob("*/bin/initdb"), default=None)
    assert found, "--postgres needs PostgreSQL: install the distribution's package postgresql"
    bin, user = Path(found).resolve().parent, "postgres"
    # Not below tmp_path: if root runs the tests, nobody else may enter there, and PostgreSQL refuses root.
    folder = Path(tempfile.mkdtemp(prefix="fedcore-"))
    as_user = []
    if os.getuid() == 0:
        shutil.chown(folder, user)
        as_user = ["runuser", "-u", user, "--"]
    data = folder / "data"

    def run(program: str, *arguments: object) -> None:
        command = [*as_user, str(bin / program), "-D", str(data), *map(str, arguments)]
        subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)

    try:
        run("initdb", "--auth=trust", f"--username={user}", "--encoding=UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=20"
        run("pg_ctl", "start", "-w", "-s", "-l", folder / "log", "-o", options)
        try:
            yield bin, folder, user
        finally:
            run("pg_ctl", "stop", "-m", "immediate", "-s")
    finally:
        shutil.rmtree(folder)
