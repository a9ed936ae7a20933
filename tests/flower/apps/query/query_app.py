"""Questions of one's own to the nodes: custom actions, errors as messages, push and pull, a timeout."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

client = ClientApp()


@client.query()
def who(msg: Message, context: Context) -> Message:
    """Say the partition, and whether all types of values arrive as they were sent."""
    config = msg.content["config"]
    kinds = ",".join(type(value).__name__ for value in config.values())
    answer = {"partition": context.node_config["partition-id"], "kinds": kinds, "blob": config["blob"][::-1]}
    answer["greeting"] = f"{context.run_config['greeting']} from {answer['partition']}"
    return Message(content=RecordDict({"answer": ConfigRecord(answer)}), reply_to=msg)


@client.query("statistics")
def statistics(msg: Message, context: Context) -> Message:
    """Count and sum, as a federated analysis does."""
    partition = context.node_config["partition-id"]
    values = np.arange(partition + 1, dtype=np.float64)
    metrics = MetricRecord({"count": len(values), "sum": float(values.sum()), "all": values.tolist()})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


@client.train("failing")
def failing(msg: Message, context: Context) -> Message:
    """Fail on odd nodes."""
    if context.node_config["partition-id"] % 2:
        raise RuntimeError(f"no data on partition {context.node_config['partition-id']}")
    return Message(content=RecordDict({"arrays": ArrayRecord([np.ones(2)])}), reply_to=msg)


@client.query("slow")
def slow(msg: Message, context: Context) -> Message:
    """Answer after the asker's patience has ended, on node 0."""
    if context.node_config["partition-id"] == 0:
        time.sleep(3)
    return Message(content=RecordDict(), reply_to=msg)


server = ServerApp()


def ask(grid: Grid, kind: str, nodes: list[int]) -> list[Message]:
    """Return one message to each node."""
    config = ConfigRecord({"i": 1, "f": 0.5, "b": True, "s": "text", "blob": b"\x00\xff", "l": [1, 2, 3]})
    content = RecordDict({"config": config})
    return [Message(content=content, message_type=kind, dst_node_id=node) for node in nodes]


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Ask everything, by every way that a Grid has."""
    while len(nodes := list(grid.get_node_ids())) < 3:
        time.sleep(0.05)
    answers = [reply.content["answer"] for reply in grid.send_and_receive(ask(grid, "query", nodes))]
    waiting = set(grid.push_messages(ask(grid, "query.statistics", nodes)))
    metrics = []
    while waiting:
        for reply in grid.pull_messages(waiting):
            waiting.remove(reply.metadata.reply_to_message_id)
            metrics.append(reply.content["metrics"])
        time.sleep(0.05)
    failed = list(grid.send_and_receive(ask(grid, "train.failing", nodes)))
    unknown = list(grid.send_and_receive(ask(grid, "query.nothing", nodes[:1])))
    started = time.monotonic()
    in_time = list(grid.send_and_receive(ask(grid, "query.slow", nodes), timeout=1.5))
    lines = {
        "greetings": sorted(answer["greeting"] for answer in answers),
        "kinds": sorted({answer["kinds"] for answer in answers}),
        "blobs": sorted({answer["blob"].hex() for answer in answers}),
        "sum": sum(metric["sum"] for metric in metrics),
        "all": sorted(metric["all"] for metric in metrics),
        "errors": sorted([reply.error.code, reply.error.reason] for reply in failed if reply.has_error()),
        "good": sum(reply.has_content() for reply in failed),
        "unknown": [[reply.error.code, reply.error.reason] for reply in unknown],
        "in time": len([reply for reply in in_time if reply.has_content()]),
        "waited": time.monotonic() - started < 2.9,
    }
    if config := context.run_config["result"]:
        Path(config).write_text(json.dumps(lines, sort_keys=True), encoding="utf-8")
