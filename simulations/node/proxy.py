"""The client app of a node: it hands its messages to the node's trainer, where there is one.

Flower starts a process for each message. This one imports neither torch nor what is built on it;
Ray it imports to reach a trainer.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp


class ProxyApp(ClientApp):
    """``clients.client_app``, run by the node's trainer.

    ``trainer`` in the node's configuration is the file that ``fedlora node`` writes. Without it the
    client app runs here.
    """

    def __call__(self, message: Message, context: Context) -> Message:
        """What the client app replies."""
        if "trainer" in context.node_config:
            from simulations.node.asking import ask

            return ask(message, context)
        from clients.client_app import app as client_app

        return client_app(message, context)


app = ProxyApp()
