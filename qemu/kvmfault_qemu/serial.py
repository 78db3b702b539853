# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the guest says (see guest/guest.c), and the times that it measured."""

import os
import re
import time

PASS = re.compile(r"^pass \d+ ok cpus ([\d ]+) tsc (\d+)$")
HISTOGRAM = re.compile(r"^histogram([ \d:]*) end$")


class Serial:
    """One QEMU's serial port.

    Output goes to a file, which never makes the guest wait; input comes from a named pipe.
    """

    def __init__(self, log, pipe):
        self.log = log
        log.touch()
        os.mkfifo(pipe)
        # Also for reading, so that it is open before QEMU opens its end and never at its end.
        self.pipe = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
        self.position, self.rest = 0, ""
        self.lines = []  # (seen at, line)
        self.passes = []  # (seen at, [passes of each CPU], tsc)
        self.wrong = None

    def poll(self):
        """Takes in what has come.

        After a migration the first line is often the second half of one.
        """
        with open(self.log, errors="replace") as log:
            log.seek(self.position)
            text = log.read()
            self.position = log.tell()
        now = time.monotonic()
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            line = line.rstrip("\r")
            if line.startswith("WRONG"):
                self.wrong = self.wrong or line
                continue
            self.lines.append((now, line))
            matched = PASS.match(line)
            if matched:
                self.passes.append((now, [int(n) for n in matched[1].split()], int(matched[2])))

    def send(self, letter):
        os.write(self.pipe, letter.encode())

    def close(self):
        if self.pipe is not None:
            os.close(self.pipe)
            self.pipe = None

    def answer(self, pattern, since):
        """The match of the first line since a number of lines that matches."""
        self.poll()
        for _, line in self.lines[since:]:
            matched = re.match(pattern, line)
            if matched:
                return matched
        return None

    def finished_since(self, first):
        """How many passes every CPU has made since the passes entry number `first`."""
        self.poll()
        if len(self.passes) <= first:
            return 0
        return min(now - then for then, now in zip(self.passes[first][1], self.passes[-1][1]))

    def ticks_per_us(self):
        (time_a, _, ticks_a), (time_b, _, ticks_b) = self.passes[0], self.passes[-1]
        return (ticks_b - ticks_a) / (time_b - time_a) / 1e6


def buckets(matched):
    """[(lowest number of ticks, count)] of a histogram's line, fastest first."""
    pairs = [tuple(map(int, pair.split(":"))) for pair in matched[1].split()]
    return [((8 + b % 8) << (b // 8) >> 3 if b >= 24 else b, count) for b, count in pairs]


def slowest(found, count):
    """The `count` slowest of a histogram."""
    kept = []
    for ticks, n in reversed(found):
        kept.insert(0, (ticks, min(n, count)))
        count -= kept[0][1]
        if not count:
            break
    return kept


def percentile(found, part):
    total = sum(n for _, n in found)
    reached = 0
    for ticks, n in found:
        reached += n
        if reached >= part * total:
            # The middle of the bucket.
            return ticks * 1.0625
    return None
