# SPDX-License-Identifier: MIT OR Apache-2.0
"""What the guest kernel's log says of its health."""

import pathlib
import re

BENIGN = pathlib.Path(__file__).parent.parent / "benign-warnings"

# The first that matches names the trouble; each is a failure of the run, whatever the command says.
TROUBLE = [
    ("panicked", r"Kernel panic - not syncing"),
    ("locked up", r"soft lockup|hard LOCKUP|blocked for more than \d+ seconds"),
    ("oopsed", r"\bOops:|\bBUG: |kernel BUG at|general protection fault|unable to handle (kernel|page)|double fault:"),
    ("stalled", r"rcu: .*(detected stalls|self-detected stall|kthread starved)"),
    ("warned", r"\bWARNING: |\bWARN_ON|------------\[ cut here \]------------"),
    ("ran out of memory", r"Out of memory: Killed process|oom-kill:|page allocation failure"),
    ("leaked or misused memory", r"\bKASAN:|\bUBSAN:|Bad page state|Bad rss-counter"),
]
CUT = "------------[ cut here ]------------"


def allowed():
    """The reviewed exceptions: one regular expression a line, after a comment with its reason."""
    lines = BENIGN.read_text().splitlines() if BENIGN.exists() else []
    return [re.compile(line) for line in lines if line.strip() and not line.startswith("#")]


def trouble(log):
    """(kind, line) of the first thing wrong in the log's text, or None."""
    exceptions = allowed()
    lines = log.splitlines()
    for number, line in enumerate(lines):
        # "cut here" only announces: judge by what follows, if anything still does.
        if CUT in line and number + 1 < len(lines):
            continue
        for kind, pattern in TROUBLE:
            if re.search(pattern, line) and not any(e.search(line) for e in exceptions):
                return kind, re.sub(r"^\[ *[\d.]+\]( \[ *[TC]\d+\])? ", "", line).strip()
    return None


def said(log, what):
    """The rest of the last line in which our init said this, or None."""
    found = re.findall(rf"kvmfault-vm: {what}\b:? ?(.*)", log)
    return found[-1].strip() if found else None
