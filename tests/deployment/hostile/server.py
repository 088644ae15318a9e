"""The hostile ServerApp: sends a query to every node, and writes the answers to files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(os.environ["COLORA_RUN"])
    targets = (folder / "targets.json").read_text()
    wanted = len(json.loads(targets)["sites"])
    while len(nodes := list(grid.get_nodes())) < wanted:
        time.sleep(0.5)
    names = {int(node.node_id): node.name for node in nodes}
    request = RecordDict({"request": ConfigRecord({"targets": targets})})
    asked = [Message(request, node, MessageType.QUERY) for node in names]
    for message in grid.send_and_receive(asked):
        site = names[message.metadata.src_node_id]
        if message.has_error():
            (folder / f"{site}.failed").write_text(message.error.reason or "no reason")
            continue
        loot = folder / f"{site}.taking"
        loot.mkdir()
        for number, (what, data) in enumerate(message.content.config_records["loot"].items()):
            (loot / f"{number:04d}").write_bytes(what.encode() + b"\n" + bytes(data))
        loot.rename(folder / f"{site}.loot")
