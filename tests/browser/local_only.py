"""A process's `sitecustomize.py`: Python's sockets reach the local host only; what tried further is refused and noted down."""

import os
import sys

NEAR = ("", "localhost", "0.0.0.0", "::", "::1", "::ffff:127.0.0.1")


def host_of(event: str, args: tuple) -> str | None:
    """The host that an audited call is for; None where it is none of a network."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        return address[0] if isinstance(address, tuple) else None
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
        return host.decode() if isinstance(host, bytes) else host
    return None


def gate(event: str, args: tuple) -> None:
    if not event.startswith("socket."):
        return
    host = host_of(event, args)
    if host is None or host in NEAR or host.startswith("127.") or host == os.uname().nodename:
        return
    with open(os.environ["TRACELENS_SOCKET_LOG"], "a", encoding="utf-8") as log:
        log.write(f"{event} {host}\n")
    raise ConnectionRefusedError(f"only the local host can be reached in this test, not {host}")


if "TRACELENS_SOCKET_LOG" in os.environ:
    sys.addaudithook(gate)
