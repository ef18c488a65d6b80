"""Process that has imported large packages, and starts Python programs by forking, for `forked.py`.

python fork_server.py FIRST SECOND: descriptors of two sockets.  Programs asked for at the first find torch imported,
those asked for at the second transformers, too; `optimum_dern` is never imported here.  Each request is JSON with the
words after the interpreter's name, the environment and the working folder, and comes with four descriptors: standard
input, output and error, and one for two lines in answer, the process id and in the end the exit code.
"""

import gc
import json
import os
import runpy
import socket
import sys
import tempfile
import traceback

import scipy.optimize  # noqa: F401 - here and below: what transformers imports of other packages
import torch
import torch._dynamo  # noqa: F401
import torch.distributed.tensor  # noqa: F401


PYTHONPATH = os.environ.get("PYTHONPATH", "").split(os.pathsep)
PLACES = [place for place in sys.path[1:] if place not in PYTHONPATH]  # the interpreter's own


def serve(requests: socket.socket) -> None:
    """Start a program at every request, until the client is gone."""
    gc.collect()
    gc.freeze()  # a child that collects garbage would otherwise copy all pages of what is imported here
    children: set[int] = set()
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 1 << 20, 4)
        if not message:
            break
        pid = os.fork()
        if pid == 0:
            requests.close()
            keep(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        children = {child for child in (*children, pid) if os.waitpid(child, os.WNOHANG)[0] == 0}
    for child in children:
        os.waitpid(child, 0)


def keep(request: dict, descriptors: list[int]) -> None:
    """Start the program, and tell the client how it ends."""
    *streams, answer = descriptors
    pid = os.fork()
    if pid == 0:
        os.close(answer)
        os._exit(run(request, streams))
    for descriptor in streams:
        os.close(descriptor)
    os.write(answer, f"{pid}\n".encode())
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(answer, f"{code}\n".encode())
    os._exit(0)


def run(request: dict, streams: list[int]) -> int:
    """Be the program; returns its exit code."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # found before, perhaps, in another environment
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        execute(request["command"])
    except SystemExit as ended:
        code = ended.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code or 0


def execute(command: list[str]) -> None:
    """Do what the interpreter does with a command line."""
    option, program = (command[0], command[1]) if command[0] in ("-c", "-m") else (None, command[0])
    sys.argv[:] = ["-c", *command[2:]] if option == "-c" else command[bool(option) :]
    first = {"-c": "", "-m": os.getcwd(), None: os.path.dirname(os.path.abspath(program))}[option]
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [first, *places, *PLACES]
    if option == "-c":
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")


def import_transformers() -> None:
    """Import what all models need."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def main() -> None:
    """Serve at both sockets, each in a process of its own."""
    torch.set_num_threads(1)
    first, second = (socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:])
    if child := os.fork():
        second.close()
        serve(first)
        os.waitpid(child, 0)
    else:
        first.close()
        import_transformers()
        serve(second)


if __name__ == "__main__":
    main()
