# SPDX-License-Identifier: MIT OR Apache-2.0
"""How a command that builds something ends: the statuses that its callers know."""

import sys

from . import machine
from .cache import Broken, Unavailable


def exit_status(name, action):
    """0: action() is done; 122: not possible here; 123: it should have worked; 143: interrupted.

    stderr has the reason.
    """
    machine.die_cleanly()
    try:
        action()
    except (Unavailable, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 122
    except Broken as error:
        print(f"{name}: FAILED: {error}", file=sys.stderr)
        return 123
    except machine.Interrupted as error:
        print(f"{name}: interrupted by {error}", file=sys.stderr)
        return 143
    return 0
