"""What a child process gives up before it touches what nobody vouches for. Must never import anything that takes time or threads."""

from __future__ import annotations

import ctypes

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000  # linux/sched.h
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


def leave_network() -> bool:
    """Move this process, which must have one thread, into a network of its own with nothing in it; False where the kernel refuses.

    Also gives up gaining privileges by executing other programs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "unshare"):
        return False
    left = any(libc.unshare(flags) == 0 for flags in (_CLONE_NEWNET, _CLONE_NEWUSER | _CLONE_NEWNET))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return left
