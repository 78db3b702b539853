# SPDX-License-Identifier: MIT OR Apache-2.0
"""A network between two QEMUs that can go away without a word.

A process that passes on what comes, until it is killed.
"""

import os
import selectors
import signal
import socket

BUFFER = 256 << 10


def carry(listener, target):
    """Passes on between each connection to `listener` and one of its own to `target`.

    A slow reader holds up its writer, as in a network.
    """
    selector, parent = selectors.DefaultSelector(), os.getppid()
    selector.register(listener, selectors.EVENT_READ)
    other = {}
    while os.getppid() == parent:
        for key, _ in selector.select(1):
            here = key.fileobj
            if here is listener:
                near, far = here.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(target)
                for end, peer in ((near, far), (far, near)):
                    other[end] = peer
                    selector.register(end, selectors.EVENT_READ)
                continue
            data = here.recv(BUFFER)
            if data:
                other[here].sendall(data)
                continue
            # The half that is over; the other may have something to say yet.
            selector.unregister(here)
            other[here].shutdown(socket.SHUT_WR)


class Proxy:
    """From its socket `path` to `target`; both are names in the file system."""

    def __init__(self, path, target):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        self.process = os.fork()
        if not self.process:
            try:
                carry(listener, str(target))
            finally:
                os._exit(1)
        listener.close()

    def kill(self):
        if self.process:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
            self.process = 0
