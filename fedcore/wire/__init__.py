"""What travels between processes, and the only door to gRPC: `from fedcore.wire import grpc`.

gRPC's C core has no setting for the lowest TLS version, and its servers take TLS 1.2. Its list of cipher
suites does the job: with a suite that gRPC's BoringSSL can use in no certificate handshake, nothing of
TLS 1.2 is left, while the suites of TLS 1.3 are not on that list and stay. The core reads the variable
once, so it must be set before the first `import grpc`; import sorters put third-party imports first,
which is why nothing in fedcore imports grpc by itself. Messages alone need no gRPC, so it is imported when
it is asked for: a simulation starts without it.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

from fedcore.errors import ConfigError

if TYPE_CHECKING:
    import grpc as grpc

VARIABLE, SUITES = "GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305"


def tls13_only() -> None:
    """Make gRPC refuse TLS 1.2 in this process and its children, unless it is too late."""
    if "grpc" not in sys.modules:
        os.environ[VARIABLE] = SUITES


def __getattr__(name: str) -> Any:
    """Return grpc.

    Raises ConfigError if it was imported before without the setting: nothing may run on the weaker one
    unnoticed.
    """
    if name != "grpc":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if os.environ.get(VARIABLE) != SUITES:
        raise ConfigError(
            f"grpc was imported before fedcore.wire, so it would accept TLS 1.2 ({VARIABLE} is "
            f"{os.environ.get(VARIABLE)!r}); import fedcore.wire first, or export {VARIABLE}={SUITES}"
        )
    import grpc

    return grpc


tls13_only()
