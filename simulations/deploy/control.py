"""What is asked of a SuperLink: its nodes, and its runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import httpx
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    StreamLogsRequest,
)
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from fedlora.errors import FedloraError
from simulations.deploy.layout import Place

FINISHED = "finished"


class UnansweredError(FedloraError):
    """A SuperLink that does not answer any more."""


class Control:
    """A SuperLink that answers.

    Every method raises ``FedloraError`` if it refuses or stops answering.
    """

    def __init__(self, client: ControlHttpClient, where: str) -> None:
        self._client, self._where = client, where

    def nodes(self) -> dict[bytes, str]:
        """The state of each registered node, ``online``, ``offline`` or ``registered``, by key."""
        with self._one_line():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.public_key: node.status for node in found if node.status != "unregistered"}

    def register(self, public_key: bytes) -> None:
        """Let a node join that has this key."""
        with self._one_line():
            self._client.RegisterNode(RegisterNodeRequest(public_key=public_key))

    def start(self, bundle: bytes, run_config: Mapping[str, str | int | float | bool]) -> int:
        """Submit an app; returns the number of its run."""
        fab = Fab(hashlib.sha256(bundle).hexdigest(), bundle, {})
        request = StartRunRequest(
            fab=fab_to_proto(fab), override_config=user_config_to_proto(dict(run_config))
        )
        with self._one_line():
            answer = self._client.StartRun(request)
        if not answer.HasField("run_id"):
            raise FedloraError(f"SuperLink at {self._where}: did not start the run {answer.note}")
        return int(answer.run_id)

    def logs(self, run: int) -> Iterator[str]:
        """What a run's server app prints, as it comes, until the run has ended."""
        with self._one_line():
            for part in self._client.StreamLogs(StreamLogsRequest(run_id=run, after_timestamp=0.0)):
                yield part.log_output

    def outcome(self, run: int) -> tuple[str, str]:
        """How a run ended (``completed``, ``failed``, ``stopped``), and what is said of it."""
        with self._one_line():
            found: Run = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run]
        return found.status.sub_status, found.status.details

    def unfinished(self, folder: str) -> list[int]:
        """Runs that have not ended, and write to a folder."""
        with self._one_line():
            runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return [
            number
            for number, run in runs.items()
            if run.status.status != FINISHED and run.override_config["folder"].string == folder
        ]

    def stop(self, run: int) -> None:
        """End a run."""
        with self._one_line():
            self._client.StopRun(StopRunRequest(run_id=run))

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """What goes wrong, in one line."""
        try:
            yield
        except httpx.HTTPStatusError as error:
            told = FlowerError.from_json(error.response.text)
            said = f"{told.message} {told.public_details or ''}" if told else str(error)
            raise FedloraError(f"SuperLink at {self._where}: refused: {said}") from None
        except (httpx.HTTPError, ValueError) as error:
            reason = type(error).__name__
            raise UnansweredError(
                f"SuperLink at {self._where}: stopped answering ({reason})"
            ) from None


@contextmanager
def control(place: Place) -> Iterator[Control]:
    """The SuperLink of a deployment; see ``reach_superlink`` for what may be wrong before."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with ControlHttpClient.from_server_address(
        place.deployment.address,
        insecure=False,
        root_certificates=place.authority.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="fedlora")],
    ) as client:
        yield Control(client, place.deployment.plain)
