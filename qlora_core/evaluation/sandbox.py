"""Runs a model's Python code against unit tests in a process of its own, with little to reach and little time.

A guard against accidents, not against an attacker: the process gets an empty folder, an empty environment, limits on
processor time, memory, file size and open files, no network calls through Python's socket module, and is
killed with its whole group at the end. Code that may be hostile belongs in a container or a virtual machine.
"""

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

CODE_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)

# The token is printed only after the last test, and the code under test cannot know it when it exits early by itself:
# it is read from a pipe and deleted before that code runs.
RUNNER = """
import resource, sys
for name, most in (("CPU", int(sys.argv[1])), ("AS", 1 << 30), ("FSIZE", 1 << 20), ("NOFILE", 64), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
def _blocked(*args, **kwargs):
    raise OSError("no network in the sandbox")
import socket
socket.socket.connect = _blocked
socket.create_connection = _blocked
_token = sys.stdin.read()
_report = sys.stdout
def _main():
    token, report = _take()
    space = {"__name__": "answer"}
    exec(compile(open("answer.py").read(), "answer.py", "exec"), space)
    exec(compile(open("tests.py").read(), "tests.py", "exec"), space)
    report.write(token)
    report.flush()
def _take():
    global _token, _report
    taken = _token, _report
    del _token, _report
    sys.stdout = sys.stderr
    return taken
_main()
"""


def code_of(answer: str) -> str:
    """The answer's fenced code blocks joined, or all of it where it has none."""
    blocks = CODE_BLOCK.findall(answer)
    return "\n".join(blocks) if blocks else answer


def run_tests(answer: str, tests: str, *, timeout_s: float) -> bool:
    """Whether the code in `answer` passes `tests`: Python statements (asserts) that run after it in the same names.

    False for any exception, exit, kill or timeout. Nothing of the code's own output counts.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="qlora-sandbox-") as folder:
        home = Path(folder)
        (home / "answer.py").write_text(code_of(answer), encoding="utf-8")
        (home / "tests.py").write_text(tests, encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", RUNNER, str(int(timeout_s) + 1)],
            cwd=home,
            env={"HOME": folder, "TMPDIR": folder},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(token.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _kill_group(process)
    return process.returncode == 0 and printed == token.encode()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # the group ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
