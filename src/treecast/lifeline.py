"""Start a command that the kernel kills when the one who asked for it is gone.

Run as a script, with the parent's pid and the command as arguments. It asks for a
signal at its parent's death and then becomes the command, so the process keeps this pid.

Imports nothing but what it needs: it runs before every service.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            sys.exit("the process that asked for this one is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
