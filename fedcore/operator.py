"""An operator's side of a coordinator: submit runs, watch them, fetch their models."""

import io
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from fedcore.crypto.files import make_private_folder, write_atomically
from fedcore.crypto.identity import Identity, utc_now
from fedcore.crypto.passphrase import unlocked
from fedcore.crypto.tls import channel_credentials, demand
from fedcore.errors import AuthenticationError, ConfigError, FedcoreError, ProtocolError, RunFailed, SpecError
from fedcore.layout import Layout, Parameters
from fedcore.messages import Blob, Submission
from fedcore.wire import grpc
from fedcore.wire.address import parse_address
from fedcore.wire.chunks import chunks
from fedcore.wire.codec import to_wire
from fedcore.wire.enrolment import enrol
from fedcore.wire.renewal import renewed_if_due
from fedcore.wire.v1 import coordinator_pb2 as pb
from fedcore.wire.v1.coordinator_pb2_grpc import OperatorStub
from fedcore.wire.v1.relay_pb2_grpc import PostStub

CONFIG = "operator.toml"
DEADLINE = 30.0  # seconds of a call that moves no model
TRANSFER_DEADLINE = 3600.0
FETCHES = 3
SOONEST, LATEST = 600.0, 43200.0  # seconds between two looks at a certificate
OPTIONS = (
    ("grpc.max_receive_message_length", 64 * 2**20),  # a layout and all rows come as one message
    # Whoever waits for answers hears of a line that is dead, and finds a coordinator that is back.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def enrol_operator(folder: Path, token: str, coordinator: str) -> Identity:
    """Make an operator's folder: its identity and the coordinator's address."""
    parse_address(coordinator)
    make_private_folder(folder)
    identity = enrol(token, folder / "identity", "operator")
    write_atomically(folder / CONFIG, tomli_w.dumps({"coordinator": coordinator}).encode(), 0o644)
    return identity


class Operator:
    """Calls to one coordinator; errors come back as FedcoreError with what the coordinator said.

    post: the calls of an app's server side, see `fedcore.flower.mail`.
    """

    stub: OperatorStub
    post: PostStub

    def __init__(self, folder: Path, address: str, channels: ExitStack) -> None:
        """Call as the identity in a folder, whose certificate is renewed if that is due."""
        self.folder, self.address, self.channels = folder, address, channels
        self.identity = unlocked(folder)
        self._use(renewed_if_due(folder, self.identity))

    def renew(self) -> float:
        """Go on with another certificate if that is due; return after how many seconds to look again.

        Calls in progress come to their end.
        """
        if (identity := renewed_if_due(self.folder, self.identity)) is not self.identity:
            self._use(identity)
        return min(max((identity.renewal - utc_now()).total_seconds(), SOONEST), LATEST)

    def _use(self, identity: Identity) -> None:
        self.identity = identity
        options = (*demand(identity.name.federation, "coordinator"), *OPTIONS)
        channel = grpc.secure_channel(self.address, channel_credentials(identity), options)
        self.channels.enter_context(channel)  # an older one stays open, for the calls in progress
        self.stub, self.post = OperatorStub(channel), PostStub(channel)

    @classmethod
    @contextmanager
    def connect(cls, folder: Path) -> Iterator["Operator"]:
        """Open the connection that an operator's folder describes."""
        try:
            settings = tomllib.loads((folder / CONFIG).read_text(encoding="utf-8"))
            address = parse_address(str(settings["coordinator"]))
        except (OSError, ValueError, KeyError) as error:
            hint = "make the folder with 'fedcore run enroll TOKEN --coordinator HOST:PORT --dir DIR'"
            reason = getattr(error, "strerror", error)
            raise ConfigError(f"{folder / CONFIG}: {reason}; {hint}") from error
        with ExitStack() as channels:
            try:
                yield cls(folder / "identity", address, channels)
            except grpc.RpcError as error:
                raise explained(error, address) from error

    def submit(self, submission: Submission, parameters: Parameters) -> pb.RunInfo:
        """Hand in a run and its initial parameters."""
        file = io.BytesIO(b"".join(vector.tobytes() for vector in parameters.vectors().values()))
        parts = (pb.SubmitPart(chunk=chunk) for chunk in chunks(file))
        info: pb.RunInfo = self.stub.Submit(chain([to_wire(submission)], parts), timeout=TRANSFER_DEADLINE)
        return info

    def list(self) -> list[pb.RunInfo]:
        """Return all runs, the newest first."""
        return list(self.stub.List(pb.ListRequest(), timeout=DEADLINE).runs)

    def show(self, run: str) -> pb.RunInfo:
        """Return a run with its layout and metrics."""
        info: pb.RunInfo = self.stub.Show(pb.RunName(run=run), timeout=DEADLINE)
        return info

    def watch(self, run: str) -> Iterator[pb.RunInfo]:
        """Yield the run each time it moves, until it has ended."""
        yield from self.stub.Watch(pb.RunName(run=run))

    def stop(self, run: str) -> pb.RunInfo:
        """End a run."""
        info: pb.RunInfo = self.stub.Stop(pb.RunName(run=run), timeout=DEADLINE)
        return info

    def clients(self) -> Sequence[pb.ClientInfo]:
        """Return the clients that are connected, and those of which something was refused."""
        found: pb.ClientList = self.stub.Clients(pb.ClientsRequest(), timeout=DEADLINE)
        return found.clients

    def lift(self, client: str) -> pb.ClientInfo:
        """Forget a client's offences."""
        info: pb.ClientInfo = self.stub.Lift(pb.ClientName(client=client), timeout=DEADLINE)
        return info

    def parameters(self, run: str) -> tuple[Layout, Parameters]:
        """Return a run's layout and newest model; raises ProtocolError where they arrive altered."""
        for _ in range(FETCHES):  # a round may be committed between the two calls
            info = self.show(run)
            received = self.stub.Fetch(pb.RunName(run=info.run), timeout=TRANSFER_DEADLINE)
            data = b"".join(chunk.data for chunk in received)
            if sha256(data).hexdigest() == info.parameters.sha256:
                layout = Layout.from_json(info.layout)
                return layout, Parameters.of_blob(np.frombuffer(data, layout.dtype), layout)
        raise ProtocolError(
            f"the model of {info.run} came {FETCHES} times with another SHA-256 than announced: its rounds "
            f"are faster than its transfer; try again when the run has ended"
        )


def submission_for(task: Any, spec: Any) -> tuple[Submission, Parameters]:
    """Return a run of a task as it is handed in, with initial parameters seeded as a simulation's.

    A private run states its noise: devices reserve their budget by that, not by a target. And every run
    states how updates travel, since devices judge it by that.
    """
    from fedcore.client.training import trainer_for
    from fedcore.metrics import names
    from fedcore.privacy.claims import resolved
    from fedcore.strategies import encryption
    from fedcore.strategies.catalog import strategy_of
    from fedcore.task import digest

    spec = resolved(spec)
    spec = encryption.resolved(strategy_of(spec), spec)
    trainer = trainer_for(task, spec)
    parameters, layout = trainer.parameters(), trainer.layout
    blob = Blob(parameters.digest, layout.nbytes)
    return Submission(spec, task.name, digest(task), layout, names(task.metrics), blob), parameters


def explained(error: grpc.RpcError, address: str) -> FedcoreError:
    """Return the error that tells a person what to do about a failed call."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE:
        return FedcoreError(f"the coordinator at {address} cannot be reached; is it running? ({details})")
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        hint = f"enrol with a token of role operator: fedcore run enroll TOKEN --coordinator {address}"
        return AuthenticationError(f"{details}; {hint}")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return SpecError(details)
    return RunFailed(f"the coordinator at {address} answered {code.name}: {details}")
