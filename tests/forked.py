"""Processes of one run, forked from one that has imported the large packages for all of them.

python forked.py FOLDER COUNT PROGRAM [ARGUMENT]...

The standard error of each goes to FOLDER/RANK.err, the list of their exit codes to standard output.
"""

import os
import runpy
import sys
import traceback
from pathlib import Path

import torch  # noqa: F401 - here and below: before the processes part
import transformers.modeling_utils  # noqa: F401

from optimum_dern.commands.main import main as command  # noqa: F401
from optimum_dern.engine.run.checkpoint import compress_checkpoint  # noqa: F401


def run(errors: Path, rank: int, program: str) -> None:
    """Be one of the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Fork, and wait for all."""
    folder, count, *sys.argv[:] = sys.argv[1:]
    pids = []
    for rank in range(int(count)):
        pids.append(os.fork())
        if not pids[-1]:
            run(Path(folder, f"{rank}.err"), rank, sys.argv[0])
    print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])


if __name__ == "__main__":
    main()
