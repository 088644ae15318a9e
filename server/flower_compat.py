"""Private parts of Flower that the coordinator and the simulation use.

Flower has no public API for what the coordinator does: register the sites' keys, start and stop runs, list nodes.
Flower's own command line does it through the same client. Every import names the versions in which its module was
read; the range of ``flwr`` in ``pyproject.toml`` is these versions. Importing this module does not import ``flwr``,
which takes a second: ``colora server`` starts the SuperLink first, and loads Flower while that starts.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.flower_compat import version_interceptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from flwr.app import Message
    from flwr.common.constant import ErrorCode
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.serverapp import Grid
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.run import Run

__all__ = [
    "AnnouncedReply",
    "BadReply",
    "ErrorCode",
    "Run",
    "announced_replies",
    "build_app_bundle",
    "error_reply",
    "identify_process",
    "list_nodes",
    "open_control_api",
    "public_key_bytes",
    "register_node",
    "set_message_id",
    "start_run",
    "stop_unfinished_runs",
    "unregister_node",
]

_LAZY = {
    # Read in 1.40, 1.41, 1.42: one file in all three. No public module has the error codes of messages.
    "ErrorCode": "flwr.common.constant",
    # Read in 1.40, 1.41, 1.42: one file since 1.36. The public ``flwr.serverapp.Grid`` has it in its signatures.
    "Run": "flwr.supercore.run",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def open_control_api(address: str, ca: Path | None) -> ControlHttpClient:
    """Return a client of a SuperLink's Control API, a context manager; ``ca`` (PEM) is None for plain HTTP.

    Read in 1.40, 1.41, 1.42: one file in all three. Its calls raise ``httpx.HTTPError``.
    """
    from flwr.supercore.control import ControlHttpClient

    return ControlHttpClient.from_server_address(
        address,
        insecure=ca is None,
        root_certificates=str(ca) if ca else None,
        interceptors=[version_interceptor("colora server")],
    )


def list_nodes(control: ControlHttpClient) -> Iterable[NodeInfo]:
    """Return the registered SuperNodes: ``node_id``, ``name``, ``public_key``, ``status`` ("online", ...).

    Messages of the Control API: read in 1.40, 1.41, 1.42; the same file in all three (it changes with every release
    before).
    """
    from flwr.proto.control_pb2 import ListNodesRequest

    return control.ListNodes(ListNodesRequest()).nodes_info


def register_node(control: ControlHttpClient, name: str, key: bytes) -> None:
    """Register the public key of a SuperNode under a name. Versions as for ``list_nodes``."""
    from flwr.proto.control_pb2 import RegisterNodeRequest

    control.RegisterNode(RegisterNodeRequest(public_key=key, name=name))


def unregister_node(control: ControlHttpClient, node: int) -> None:
    """Remove the registration of a SuperNode. Versions as for ``list_nodes``."""
    from flwr.proto.control_pb2 import UnregisterNodeRequest

    control.UnregisterNode(UnregisterNodeRequest(node_id=node))


def stop_unfinished_runs(control: ControlHttpClient) -> None:
    """Stop every run that has not finished. Versions as for ``list_nodes``."""
    from flwr.common.constant import Status
    from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest

    for number, run in control.ListRuns(ListRunsRequest()).run_dict.items():
        if run.status.status != Status.FINISHED:
            control.StopRun(StopRunRequest(run_id=number))


def start_run(control: ControlHttpClient, bundle: bytes) -> int:
    """Start a run of an app bundle and return its number.

    ``Fab`` and ``fab_to_proto``: read in 1.40, 1.41, 1.42; the same files since 1.36.
    """
    from flwr.common.serde import fab_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
    return control.StartRun(StartRunRequest(fab=fab_to_proto(fab))).run_id


def build_app_bundle(folder: Path) -> bytes:
    """Build the Flower app in ``folder`` (a FAB), as ``flwr build`` does, without writing it to a file.

    Read in 1.40, 1.41, 1.42: one file since 1.36. Also loads the Control API's client, which takes as long.
    """
    from flwr.cli.build import build_fab_from_disk
    from flwr.supercore.control import ControlHttpClient  # noqa: F401

    return build_fab_from_disk(folder)


def public_key_bytes(key: EllipticCurvePublicKey) -> bytes:
    """Return a public key as SuperNodes send it and the SuperLink stores it.

    Read in 1.40, 1.41, 1.42: one file since 1.36.
    """
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    return public_key_to_bytes(key)


def identify_process(run: int) -> None:
    """Make this process the ServerApp of ``run``: ``flwr.app.Message`` takes a message's run and sender from there.

    Read in 1.40, 1.41, 1.42: ``task_identity`` is one file since 1.38 and did not exist before.
    """
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, SUPERLINK_NODE_ID, 1


def set_message_id(message: Message, message_id: str) -> None:
    """Give a message its id, which has no public setter: a transport assigns it.

    Read in 1.40, 1.41, 1.42: one file (``flwr/app/metadata.py``) since 1.36. Flower's own simulation engine
    (``flwr/server/superlink/fleet/vce/vce_api.py``) sets it in the same way.
    """
    message.metadata.__dict__["_message_id"] = message_id


MAX_PARTS = 10_000  # of a reply that is accepted, of at most 5 MiB each


@dataclass(frozen=True)
class AnnouncedReply:
    """A reply that a site has announced, and may still be uploading.

    ``request`` is the id of the request. ``pull`` returns a part's bytes, or None if it is not uploaded yet. ``finish``
    makes the reply of all parts, which it takes out of the dictionary, if its arrays have at most so many bytes. Both
    raise BadReply. They repeat a call while the SuperLink cannot be reached.
    """

    request: str
    parts: Sequence[str]  # ids, the root last; those beyond ``MAX_PARTS`` + 1 are left out
    pull: Callable[[str], bytes | None]
    finish: Callable[[dict[str, bytes], int], Message]


class BadReply(Exception):
    """A reply that never comes whole, is too large, or is no message. The text says which; it quotes no site."""


def announced_replies(grid: Grid, message_ids: Iterable[str]) -> list[AnnouncedReply]:
    """Return the replies to these requests that sites have announced. An announced reply is not announced again.

    Flower's ``Grid.pull_messages`` downloads all of them one after the other, so that one reply whose parts never come
    holds up the others for two hours, and one that is no message loses them.

    Does what ``HttpGrid.pull_messages`` does, read in 1.40, 1.41 and 1.42: ``superlink/grid/http_grid.py`` and
    ``supercore/inflatable`` are the same in all three. Grids without a network return whole messages.
    """
    client, ids = getattr(grid, "_runtime_client", None), list(message_ids)
    if client is None:
        replies = grid.pull_messages(ids) if ids else []
        return [
            AnnouncedReply(m.metadata.reply_to_message_id, (), lambda part: None, lambda parts, most, m=m: m)
            for m in replies
        ]
    from flwr.proto.runtime_pb2 import PullAppMessagesRequest
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

    response = client.PullMessages(PullAppMessagesRequest(message_ids=ids))
    found = []
    for proto, tree in zip(response.messages_list, response.message_object_trees, strict=True):
        parts = dict.fromkeys(islice((node.object_id for node in iterate_object_tree(tree)), MAX_PARTS + 1))
        finish = partial(_finish, grid, proto.metadata.message_id, proto.metadata.reply_to_message_id)
        found.append(
            AnnouncedReply(proto.metadata.reply_to_message_id, tuple(parts), partial(_pull_part, grid), finish)
        )
    return found


def _pull_part(grid: Any, part: str) -> bytes | None:
    from flwr.proto.message_pb2 import PullObjectRequest

    found = grid._runtime_client.PullObject(PullObjectRequest(node=grid.node, run_id=grid.run.run_id, object_id=part))
    if not found.object_found:
        raise BadReply("a reply of which the SuperLink lacks a part")
    return found.object_content if found.object_available else None


def _finish(grid: Any, message_id: str, request: str, contents: dict[str, bytes], max_bytes: int) -> Message:
    """Make a reply of its parts, which the SuperLink may then delete."""
    from flwr.app import Message
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    grid._runtime_client.ConfirmMessageReceived(
        ConfirmMessageReceivedRequest(node=grid.node, run_id=grid.run.run_id, message_object_id=message_id)
    )
    try:
        size = _decoded_size(contents)
        message = inflate_object_from_contents(message_id, contents) if size <= max_bytes else None
    except Exception as error:  # the parts are a site's bytes
        raise BadReply(f"a reply that cannot be decoded ({type(error).__name__})") from None
    if size > max_bytes:
        raise BadReply(f"a reply whose arrays have more than {max_bytes} bytes")
    if not isinstance(message, Message):
        raise BadReply("a reply that is not a message")
    if message.metadata.reply_to_message_id != request:
        raise BadReply("a reply that names another request")
    set_message_id(message, message_id)
    return message


def _decoded_size(contents: Mapping[str, bytes]) -> int:
    """Return the bytes of all arrays once they are decoded: an array may name one chunk many times.

    ``Array.inflate`` (``flwr/app/message/array.py``): read in 1.40, 1.41 and 1.42, one file in all three.
    """
    from flwr.app import Array
    from flwr.supercore.inflatable.inflatable_object import get_object_body, get_object_head_values_from_object_content

    size = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            lengths = [len(contents[child]) for child in dict.fromkeys(children)]
            size += sum(lengths[i] for i in json.loads(get_object_body(content, Array))["arraychunk_ids"])
    return size


def error_reply(request_id: str, code: int, reason: str) -> Message:
    """Return a reply that reports an error of the request ``request_id``, as Flower makes it for a lost reply.

    ``make_message``: read in 1.40, 1.41 and 1.42, one file in all three.
    """
    from flwr.app import Error, Metadata
    from flwr.app.message import make_message

    metadata = Metadata(
        run_id=0,
        message_id=f"error of {request_id}",
        src_node_id=0,
        dst_node_id=0,
        reply_to_message_id=request_id,
        group_id="",
        created_at=time.time(),
        ttl=0,
        message_type="system",
    )
    return make_message(metadata=metadata, error=Error(code=code, reason=reason))
