"""`python without_links.py PROGRAM ARGUMENTS...`: run a Python program to which the kernel refuses every hard link.

As a file system without them does, by a filter on system calls that the program's children inherit. Ends with status 77
where no such filter can be set.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

LINK_CALLS = {"x86_64": (86, 265), "aarch64": (37,)}
CANNOT = 77
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, FILTER_MODE = 38, 22, 2
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM


class FilterProgram(ctypes.Structure):
    """`struct sock_fprog` of linux/filter.h."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse_links() -> bool:
    """From now on link(2) and linkat(2) fail with EPERM; False where that cannot be had."""
    calls = LINK_CALLS.get(platform.machine(), ())
    lines = [(LOAD, 0, 0, 0)]
    # Each line jumps to the last but one, which refuses, if the number is the call's.
    lines += [(JUMP_IF_EQUAL, len(calls) - index, 0, call) for index, call in enumerate(calls)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, REFUSE)]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    program = FilterProgram(len(lines), code)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return (
        bool(calls)
        and prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and prctl(PR_SET_SECCOMP, FILTER_MODE, ctypes.byref(program), 0, 0) == 0
    )


if __name__ == "__main__":
    if not refuse_links():
        sys.exit(CANNOT)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
