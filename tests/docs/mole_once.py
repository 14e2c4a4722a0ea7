"""Runs many `mole` command lines quickly: libraries are imported once, and each command runs in a fork of that process.

    python mole_once.py SOCKET serve             runs the commands of its clients, until its stdin ends
    python mole_once.py SOCKET run ARGUMENTS...  is like `python -m molecli ARGUMENTS...`, in the same folder

Importing torch, transformers and diffusers takes longer than most commands of the tutorial.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence


def serve(path: str) -> None:
    """Runs command lines one after another until stdin ends; writes a line to stdout when it is ready."""
    import select

    import_all()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                request, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
                child = os.fork()
                if child == 0:
                    run_here(*json.loads(request), streams)
                for stream in streams:
                    os.close(stream)
                code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                connection.sendall(bytes([code if code >= 0 else 1]))


def run_here(folder: str, arguments: Sequence[str], streams: Sequence[int]) -> None:
    """Runs one command line in this process with these streams as stdin, stdout and stderr, and ends the process."""
    import runpy
    import traceback

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    sys.argv = ["mole", *arguments]
    code = 1
    try:
        runpy.run_module("molecli", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def import_all() -> None:
    """Imports every module of the package, and the modules of transformers and diffusers that are imported lazily."""
    import pkgutil
    from importlib import import_module

    import diffusers
    import transformers

    import molecli

    for module in pkgutil.walk_packages(molecli.__path__, "molecli."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for name in ("T5ForConditionalGeneration", "CLIPTextModel", "CLIPTokenizer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    for name in ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler"):
        getattr(diffusers, name)


def run(path: str, arguments: Sequence[str]) -> int:
    """The exit code of one command line."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        socket.send_fds(client, [json.dumps([os.getcwd(), arguments]).encode()], [0, 1, 2])
        answer = client.recv(1)
    return answer[0] if answer else 1


if __name__ == "__main__":
    if sys.argv[2] == "serve":
        serve(sys.argv[1])
    else:
        sys.exit(run(sys.argv[1], sys.argv[3:]))
