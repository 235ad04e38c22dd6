"""Runs a command that cannot outlive its parent: `python guard.py PARENT_PID COMMAND…`.

A parent that is killed hard cannot stop its servers, so the servers must notice it themselves. On Linux the
kernel does it (`PR_SET_PDEATHSIG`, which survives the exec). Elsewhere standard input is a pipe from the
parent, and a forked watcher kills the command when it closes. Either way the command keeps the process id
that the parent knows.

Run as a script and not as a module, so that it starts in ten milliseconds; it imports nothing of ours.
"""

from __future__ import annotations

import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1


def ask_kernel() -> None:
    """Has the kernel kill this process when the thread that started it ends (prctl(2); Linux)."""
    import ctypes  # noqa: PLC0415 - not needed elsewhere than on Linux

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def fork_watcher() -> None:
    """Forks a process that kills this one when standard input closes, and ends when this one does."""
    watched = os.getpid()
    if os.fork():
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return
    while os.getppid() == watched:
        if select.select([0], [], [], 0.5)[0]:  # nobody writes to it: this is its end
            os.kill(watched, signal.SIGKILL)
            break
    os._exit(0)


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ask_kernel()
    else:
        fork_watcher()
    if os.getppid() != parent:  # it died before we asked
        sys.exit(f"the process {parent} that started {command[0]} is gone")
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
