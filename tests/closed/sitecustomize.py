"""R05: a test that reaches for the network fails, by name or by address; loopback and Unix sockets are allowed.

Python imports a module of this name at its start, so that the processes which tests start are closed too.
"""

import functools
import socket

LOOPBACK = ("127.", "::1", "localhost")


def check(host):
    if host and not str(host).startswith(LOOPBACK):
        raise OSError(f"the network is closed in tests: {host!r}")


def close():
    """Close this process; there is no way back, and none is needed."""
    def guarded(method):
        @functools.wraps(method)
        def call(self, *arguments):
            if self.family != socket.AF_UNIX:
                check(arguments[-1][0])
            return method(self, *arguments)
        return call

    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
    lookup = socket.getaddrinfo

    @functools.wraps(lookup)
    def look_up(host, *arguments, **keywords):
        check(host.decode() if isinstance(host, bytes) else host)
        return lookup(host, *arguments, **keywords)

    socket.getaddrinfo = look_up


close()
