# SPDX-License-Identifier: MIT OR Apache-2.0
"""Talking to a QEMU by QMP. Nothing here waits without an end."""

import json
import socket
import time


class Failed(Exception):
    """What makes a case fail; the message is its reason."""


class Qmp:
    """path: the socket that QEMU listens on; it is there as soon as the process has got so far."""

    def __init__(self, name, path, timeout):
        self.name, self.rest, self.events = name, b"", []
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.read("greeting", timeout)
        self.execute("qmp_capabilities", timeout=timeout)

    def close(self):
        self.socket.close()

    def read(self, what, timeout):
        """The next message."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self.rest:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                data = self.socket.recv(65536)
            except TimeoutError:
                raise Failed(f"{self.name}: no answer to {what} within {timeout:g} s")
            except OSError as error:
                raise Failed(f"{self.name}: {what}: {error}")
            if not data:
                raise Failed(f"{self.name}: QEMU closed the connection during {what}")
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def execute(self, command, arguments=None, timeout=60):
        """The answer's "return"; an answer that is an error is a failure."""
        message = {"execute": command}
        if arguments is not None:
            message["arguments"] = arguments
        try:
            self.socket.settimeout(timeout)
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise Failed(f"{self.name}: {command}: {error}")
        deadline = time.monotonic() + timeout
        while True:
            answer = self.read(command, max(0.001, deadline - time.monotonic()))
            if "event" in answer:
                stamp = answer["timestamp"]
                self.events.append((answer["event"], stamp["seconds"] + stamp["microseconds"] / 1e6))
            elif "error" in answer:
                raise Failed(f"{self.name}: {command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def first(self, event):
        """When it was sent first, in seconds of the wall clock.

        None if it wasn't (or came after the last answer).
        """
        return next((when for name, when in self.events if name == event), None)

    def timed(self, command, timeout):
        """Seconds until the answer."""
        start = time.monotonic()
        self.execute(command, timeout=timeout)
        return time.monotonic() - start
