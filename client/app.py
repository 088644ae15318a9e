"""The thin ClientApp: it hands messages to the site's trainer and imports neither torch nor transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..common import messages
from ..common.errors import ColoraError
from ..common.protocol import Description, Order, Reply

logger = logging.getLogger("colora.site")


class Site(Protocol):
    """What stands behind the ClientApp: a trainer in this process or a connection to one."""

    name: str

    def describe(self, federation: str, plan: str) -> Description:
        """Introduces the site, ready to train by ``plan`` (settings as JSON)."""
        ...

    def respond(self, order: Order) -> Reply:
        """Answers an order."""
        ...


Connect = Callable[[Context], Site]


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp whose messages are answered by the site that ``connect`` finds for a context."""
    app = ClientApp()

    @app.query()
    def join(message: Message, context: Context) -> Message:
        return _answer(connect, message, context, lambda site: site.describe(*messages.join_of(message)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(connect, message, context, lambda site: site.respond(messages.order_of(message)))

    return app


def _answer(
    connect: Connect, message: Message, context: Context, ask: Callable[[Site], Description | Reply]
) -> Message:
    """The site's answer, or what kind of error it was: an error's text may quote data and stays in the site's log."""
    try:
        return messages.answer(ask(connect(context)), message)
    except ColoraError as error:
        logger.error("%s", error)
        return messages.failure(error.public(), message)
    except Exception as error:
        logger.exception("an unexpected error at a site")
        return messages.failure(type(error).__name__, message)


def _resident(context: Context) -> Site:
    from .connection import connect

    return connect(context)


app = make_app(_resident)  # of a site with a resident trainer, found by the environment
