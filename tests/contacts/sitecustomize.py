"""First on PYTHONPATH of a command under test: every Python process notes whom it contacts, in the file RAG_TEST_CONTACTS.

One line a contact: what was done, with which machine, by which program. Connections of UDP are left out, as connecting
sends nothing.
"""

import os
import socket
import sys


def _note(event: str, arguments: tuple) -> None:  # type: ignore[type-arg]
    if event == "socket.getaddrinfo":
        what, host = "looked up", arguments[0]
    elif event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        if arguments[0].type == socket.SOCK_DGRAM:
            return
        what, host = "connected to", arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    line = f"{what} {host} by {' '.join(getattr(sys, 'orig_argv', ['?'])[:6])}".replace("\n", " ")
    descriptor = os.open(os.environ["RAG_TEST_CONTACTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, (line[:500] + "\n").encode())
    finally:
        os.close(descriptor)


if "RAG_TEST_CONTACTS" in os.environ:
    sys.addaudithook(_note)
