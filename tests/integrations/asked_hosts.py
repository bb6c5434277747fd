"""Which other machines a program asks, by Python's own audit events: nothing that a test runs may phone home."""

import sys

_HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", None, "")


def asked_hosts() -> set[str]:
    """From now on, in this process: a set that grows by each host that is looked up or connected to."""
    found: set[str] = set()

    def hear(event: str, arguments: tuple) -> None:
        host = None
        if event == "socket.getaddrinfo":
            host = arguments[0]
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            host = arguments[1][0]
        host = host.decode() if isinstance(host, bytes) else host
        if host not in _HERE:
            found.add(str(host))

    sys.addaudithook(hear)
    return found
