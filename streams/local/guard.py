"""Runs a command that ends with its parent: `python guard.py PARENT_PID COMMAND…`.

A parent killed by SIGKILL cannot stop its children. On Linux the kernel kills them (`PR_SET_PDEATHSIG`, which
is preserved by exec). On other systems standard input is a pipe from the parent, and a forked watcher kills
the command when the pipe closes. The command has the process id that the parent got.

Run as a script, without imports from this project, so that it starts in ten milliseconds.
"""

from __future__ import annotations

import os
import select
import signal
import sys

PR_SET_PDEATHSIG = 1


def ask_kernel() -> None:
    """Asks the kernel to kill this process when the thread that started it ends (prctl(2); Linux)."""
    import ctypes  # noqa: PLC0415 - needed only on Linux

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def fork_watcher() -> None:
    """Forks a process that kills this one when standard input closes, and ends with this one."""
    watched = os.getpid()
    if os.fork():
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return
    while os.getppid() == watched:
        if select.select([0], [], [], 0.5)[0]:  # nothing is written to the pipe: it was closed
            os.kill(watched, signal.SIGKILL)
            break
    os._exit(0)


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ask_kernel()
    else:
        fork_watcher()
    if os.getppid() != parent:  # the parent ended before the guard was set up
        sys.exit(f"parent process {parent} of {command[0]} has ended")
    try:
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
