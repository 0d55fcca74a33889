"""What the operating system refused about a file, in one line: which path, why, and what to do next.

Knows error numbers, not which command met them.
"""

import errno
import os

_NEXT_STEPS = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "name a file, not a folder",
    errno.ENOTDIR: "part of the path is a file; name another place",
    errno.EEXIST: "name another place, or move away what is there",
    errno.EACCES: "get the right to it, or name another place",
    errno.EPERM: "get the right to it, or name another place",
    errno.EROFS: "name a place that can be written to",
    errno.ENOSPC: "free some space, and give the command again",
    errno.EDQUOT: "free some space, and give the command again",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
}
_WITHOUT_PATH = (errno.ENOSPC, errno.EDQUOT)
"""A write that finds no room names no file."""


def explain_file_error(error: OSError) -> str | None:
    """The line for people; None where `error` is about no file, as a refused connection is."""
    paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, str | bytes)]
    if error.errno is None or (not paths and error.errno not in _WITHOUT_PATH):
        return None
    reason = error.strerror or os.strerror(error.errno)
    step = _NEXT_STEPS.get(error.errno, "check the path and its disk")
    named = " -> ".join(repr(path) for path in paths)
    return f"cannot use {named}: {reason}; {step}" if named else f"{reason}; {step}"
