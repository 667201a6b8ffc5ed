"""Loaded by Python at its start where this folder is in PYTHONPATH: takes the network away from the process.

Each attempt to connect, to send, or to look up a host name is recorded as a line of the file that
JAXGPT_TEST_CONNECTIONS names, and fails. Sockets of the machine's own file system (AF_UNIX) are left alone.
"""

import os
import socket
import sys

LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
CONNECTIONS = ("socket.connect", "socket.sendto", "socket.sendmsg")


def refuse(event: str, args: tuple) -> None:
    if event in CONNECTIONS and args[0].family in (socket.AF_INET, socket.AF_INET6) or event in LOOK_UPS:
        with open(os.environ["JAXGPT_TEST_CONNECTIONS"], "a") as f:
            f.write(f"{event} {args[1:] if event in CONNECTIONS else args} by {sys.argv}\n")
        raise OSError(f"{event}: there is no network")


sys.addaudithook(refuse)
