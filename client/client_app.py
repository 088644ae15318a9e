"""The ClientApp: passes messages to the site's trainer. Imports neither torch nor transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..common.errors import ColoraError, ReferenceMissingError
from ..common.protocol import flower_messages as messages
from ..common.protocol.types import Arrays, SiteInfo, SumReply, SumRequest, TrainReply, TrainRequest

logger = logging.getLogger("colora.site")


class Site(Protocol):
    """What answers the ClientApp's messages: a trainer in this process, or a client of a trainer process."""

    name: str

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        """Return the site's description for ``plan`` (settings as JSON)."""
        ...

    def received(self, federation: str, plan: str, number: int) -> Arrays:
        """Return the shared adapter that the site received in a round that it stored, or S_0 for round 0.

        Without such a round there are no arrays.
        """
        ...

    def handle(self, request: TrainRequest) -> TrainReply:
        """Run a training request."""
        ...

    def sum(self, request: SumRequest) -> SumReply:
        """Take a step of a secure sum."""
        ...


Connect = Callable[[Context], Site]


def make_app(connect: Connect) -> ClientApp:
    """Create a ClientApp whose messages are answered by the site that ``connect`` returns for a context."""
    app = ClientApp()

    @app.query()
    def join(message: Message, context: Context) -> Message:
        def describe(site: Site) -> Message:
            return messages.reply_message(site.site_info(*messages.join_from(message)), message)

        return _reply(connect, message, context, describe)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def handle(site: Site) -> Message:
            request = messages.request_from(message, lambda *which: site.received(*which))
            return messages.reply_message(site.handle(request), message, request)

        return _reply(connect, message, context, handle)

    @app.query(messages.SUM)
    def take_sum_step(message: Message, context: Context) -> Message:
        def take(site: Site) -> Message:
            return messages.reply_message(site.sum(messages.sum_request_from(message)), message)

        return _reply(connect, message, context, take)

    return app


def _reply(connect: Connect, message: Message, context: Context, call: Callable[[Site], Message]) -> Message:
    """Return the site's reply, or an error message with the error's public text.

    The full text of an error may quote data, so it is written to the site's log only.
    """
    try:
        return call(connect(context))
    except ReferenceMissingError as error:
        logger.info("%s", error)
        return messages.error_message(error.public(), message, messages.REFERENCE_MISSING)
    except ColoraError as error:
        logger.error("%s", error)
        return messages.error_message(error.public(), message)
    except Exception as error:
        logger.exception("unexpected error")
        return messages.error_message(type(error).__name__, message)


def _connect_trainer(context: Context) -> Site:
    from .trainer_service.client import connect

    return connect(context)


app = make_app(_connect_trainer)  # for a site with a trainer process, which the environment names
