"""The thin ClientApp: it hands messages to the site's trainer and imports neither torch nor transformers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from ..common.errors import ColoraError
from ..common.protocol import flower_messages as messages
from ..common.protocol.types import SiteInfo, TrainReply, TrainRequest

logger = logging.getLogger("colora.site")


class Site(Protocol):
    """What stands behind the ClientApp: a trainer in this process or a connection to one."""

    name: str

    def site_info(self, federation: str, plan: str) -> SiteInfo:
        """Introduces the site, ready to train by ``plan`` (settings as JSON)."""
        ...

    def handle(self, request: TrainRequest) -> TrainReply:
        """Answers an order."""
        ...


Connect = Callable[[Context], Site]


def make_app(connect: Connect) -> ClientApp:
    """A ClientApp whose messages are answered by the site that ``connect`` finds for a context."""
    app = ClientApp()

    @app.query()
    def join(message: Message, context: Context) -> Message:
        return _answer(connect, message, context, lambda site: site.site_info(*messages.join_from(message)))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _answer(connect, message, context, lambda site: site.handle(messages.request_from(message)))

    return app


def _answer(
    connect: Connect, message: Message, context: Context, ask: Callable[[Site], SiteInfo | TrainReply]
) -> Message:
    """The site's answer, or what kind of error it was: an error's text may quote data and stays in the site's log."""
    try:
        return messages.reply_message(ask(connect(context)), message)
    except ColoraError as error:
        logger.error("%s", error)
        return messages.error_message(error.public(), message)
    except Exception as error:
        logger.exception("an unexpected error at a site")
        return messages.error_message(type(error).__name__, message)


def _resident(context: Context) -> Site:
    from .trainer_service.client import connect

    return connect(context)


app = make_app(_resident)  # of a site with a resident trainer, found by the environment
