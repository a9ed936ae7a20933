"""What the documents say works: their blocks are executed in an empty folder."""

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("run_document.py")
DOCUMENTS = [
    "README.md",
    "docs/flower.md",
    "docs/operations.md",
    "docs/privacy.md",
    "docs/security.md",
    "docs/strategies.md",
    "docs/tutorial.md",
    "docs/write-your-own-strategy.md",
]


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_blocks_of_a_document_run(name: str, tmp_path: Path) -> None:
    log = tmp_path / "document.log"
    folder = tmp_path / "reader"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # What a reader installs lands in a folder of its own, from no index, and is found there.
    site = str(tmp_path / "site")
    paths = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    pip = {"PIP_TARGET": site, "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    with log.open("wb") as out:
        command = [sys.executable, str(RUNNER), str(ROOT / name)]
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env={**os.environ, **pip, "PYTHONPATH": paths, "PATH": path},
        )
        try:
            code = process.wait(280)
        finally:  # the servers and agents that a block left in the background
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
    assert code == 0, log.read_text(encoding="utf-8")[-3000:]


def test_the_rule_that_a_reader_writes_is_the_one_that_fedcore_new_does() -> None:
    page = (ROOT / "docs" / "write-your-own-strategy.md").read_text(encoding="utf-8")
    rule = (ROOT / "fedcore" / "templates" / "strategy" / "phocas.py").read_text(encoding="utf-8")
    assert f'```python title="digits/phocas.py"\n{rule}```' in page


@pytest.mark.parametrize(
    "page", [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name
)
def test_links_between_documents_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
