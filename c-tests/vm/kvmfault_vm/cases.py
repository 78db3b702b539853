# SPDX-License-Identifier: MIT OR Apache-2.0
"""The lines that a test runner prints:

    PASS group/case seconds [what it measured]
    FAIL group/case[mechanism] seconds reason
    SKIP group/case[mechanism] seconds reason
    N passed, N failed, N skipped
"""

import dataclasses
import re

LINE = re.compile(r"^(PASS|FAIL|SKIP) ([^\s/]+)/([^\s\[]+)(?:\[([^\]]+)\])?(?: +([\d.]+))?(?: +(.*))?$")
TOTALS = re.compile(r"^(\d+) passed, (\d+) failed, (\d+) skipped$")


@dataclasses.dataclass
class Case:
    result: str
    group: str
    name: str
    mechanism: str | None
    reason: str


class Reader:
    """Takes output as it comes; cases and totals are what could be read so far."""

    def __init__(self, on_line=lambda line: None):
        self.on_line = on_line
        self.rest = b""
        self.cases = []
        self.totals = None

    def feed(self, data):
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            self.line(line.decode(errors="replace").rstrip("\r"))

    def close(self):
        if self.rest:
            self.feed(b"\n")

    def line(self, line):
        self.on_line(line)
        case, totals = LINE.match(line), TOTALS.match(line)
        if case:
            result, group, name, mechanism, _seconds, reason = case.groups()
            self.cases.append(Case(result, group, name, mechanism, reason or ""))
        elif totals:
            self.totals = tuple(map(int, totals.groups()))

    def contradiction(self):
        """Why the lines cannot be believed, or None.

        A runner that died printed no totals, or totals that differ from its cases.
        """
        counted = tuple(sum(c.result == r for c in self.cases) for r in ("PASS", "FAIL", "SKIP"))
        if self.totals is None:
            return f"the runner printed no totals (after {len(self.cases)} cases)"
        if self.totals != counted:
            return "the runner's totals are %d/%d/%d, its lines say %d/%d/%d" % (self.totals + counted)
        if not self.cases:
            return "no case was run"
        return None
