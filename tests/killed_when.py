"""`python killed_when.py PATTERN [--flags of cai_jax.launch]`: the command, killed the moment a path has the name.

A watcher from outside sees a file a while after it appeared, and on a quick machine the stage may have ended by then.
Here the rename that gives a file or a checkpoint its name is the last thing that the process does.
"""

import os
import runpy
import signal
import sys
from pathlib import PurePath


def kill_after(rename, pattern: str):
    """`os.rename` or `os.replace`, after which the process is gone if the new name matches."""

    def renamed(source, target, **options):
        rename(source, target, **options)
        if PurePath(os.fspath(target)).match(pattern):
            os.kill(os.getpid(), signal.SIGKILL)

    return renamed


if __name__ == "__main__":
    pattern = sys.argv.pop(1)
    os.rename, os.replace = kill_after(os.rename, pattern), kill_after(os.replace, pattern)
    sys.path[0] = os.getcwd()  # as with python -m
    runpy.run_module("cai_jax.launch", run_name="__main__", alter_sys=True)
