"""A device's process for an app: `python -m fedcore.flower.hosted`, JSON lines in and out.

    {"do": "describe", "folder": ..., "tasks": {name: folder}}  -> {name: digest}
    {"do": "work", "app": ..., "digest": ..., "client": ..., "node": {...}, "letter": id, "head": hex,
     "content": path, "newest": path}  -> {}

The agent, which never imports Flower, asks through `fedcore.client.serving`. `newest` holds the app's state
after the run's last letter; the answer to this one and the state after it take its place, at once.
"""

from collections.abc import Mapping
from pathlib import Path

from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp

from fedcore.client.letters import spool, state_in
from fedcore.client.serving import Message, main
from fedcore.errors import TaskError, UpdateRefused
from fedcore.flower import hosting
from fedcore.flower.app import App
from fedcore.flower.letters import Letter, node_id


class Host:
    """The apps of this process, imported once; an agent gives each process one."""

    def __init__(self) -> None:
        """Know no app until `describe`."""
        self.apps: dict[str, tuple[App, str, ClientApp]] = {}

    def describe(self, folder: str, tasks: Mapping[str, str]) -> dict[str, str]:
        """Import the apps of an agent's folder and return the digest of each; raises TaskError."""
        for name, path in tasks.items():
            app = App.read(Path(folder) / path)
            if app.name != name:
                raise TaskError(f'{path} is the app {app.name!r}; expected "{app.name}" = "{path}"')
            self.apps[name] = app, app.digest, hosting.load(app)
        return {name: digest for name, (_, digest, _) in self.apps.items()}

    def work(
        self,
        app: str,
        digest: str,
        client: str,
        node: Mapping[str, UserConfigValue],
        letter: str,
        head: str,
        content: str,
        newest: str,
    ) -> Message:
        """Give a letter to the app, and put its answer and its new state on the disk."""
        read, imported, hosted = self.apps[app]
        if imported != digest:
            raise UpdateRefused(f"the files of {app} have changed since the agent started; start it again")
        said = Path(content).read_bytes() if content else None
        sent = Letter(letter, node_id(client), bytes.fromhex(head), said)
        answer, state = hosting.answer(hosted, sent, node, read.config, state_in(Path(newest)), None)
        spool(Path(newest), letter, answer.head, answer.content, state)
        return {}


if __name__ == "__main__":
    host = Host()
    main({"describe": host.describe, "work": host.work})
