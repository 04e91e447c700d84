"""Make every Python process of a command under test log the hosts that it contacts to the file RAG_TEST_CONTACTS.

Works because this folder is first on the command's PYTHONPATH. Writes one line per contact: action, host, program.
Leaves out UDP, because connecting a UDP socket sends nothing.
"""

import os
import socket
import sys


def _note(event: str, arguments: tuple) -> None:  # type: ignore[type-arg]
    if event == "socket.getaddrinfo":
        action, host = "looked up", arguments[0]
    elif event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        if arguments[0].type == socket.SOCK_DGRAM:
            return
        action, host = "connected to", arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    line = f"{action} {host} by {' '.join(getattr(sys, 'orig_argv', ['?'])[:6])}".replace("\n", " ")
    descriptor = os.open(os.environ["RAG_TEST_CONTACTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, (line[:500] + "\n").encode())
    finally:
        os.close(descriptor)


if "RAG_TEST_CONTACTS" in os.environ:
    sys.addaudithook(_note)
