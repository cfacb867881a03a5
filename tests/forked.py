"""``lycotool`` for shells in tests, without paying for the import of torch at every call.

A server imports everything once and forks for each call; what is on the path is a small client
that hands over its streams, folder and arguments and ends with the exit code. Nothing else
differs from the console script: each call is a process of its own, on the real streams.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

_CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
call = json.dumps(dict(argv=sys.argv[1:], cwd=os.getcwd(), environment=dict(os.environ))).encode()
socket.send_fds(server, [len(call).to_bytes(4, "big")], [0, 1, 2])
server.sendall(call)
code = server.recv(4)
os._exit(int.from_bytes(code, "big") if code else 1)
"""


@contextlib.contextmanager
def lycotool_on_path(folder: Path) -> Iterator[Mapping[str, str]]:
    """An environment whose ``PATH`` begins with a ``lycotool`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    address = str(folder / "s")
    client = folder / "lycotool"
    client.write_text(_CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    paths = [str(Path(__file__).parent), *sys.path]
    server = subprocess.Popen(
        [sys.executable, "-m", "forked", address], env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    try:
        while not Path(address).exists():
            if server.poll() is not None:
                raise RuntimeError(server.returncode)
            time.sleep(0.02)
        yield {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> None:
    """Fork for each call, until the end."""
    import torch

    torch.set_num_threads(1)
    from prepared import build_commands_once, get_ready_to_fork

    from lycotool.cli import main
    from lycotool.ops import bake, convert, extract, merge, replay, resize  # noqa: F401 - what calls will need

    build_commands_once()
    get_ready_to_fork()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        call, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            call.sendall(_run(call, main).to_bytes(4, "big"))
            os._exit(0)
        call.close()


def _run(call: socket.socket, main: object) -> int:
    size, streams, _, _ = socket.recv_fds(call, 4, 3)
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += call.recv(1 << 16)
    request = json.loads(content)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["lycotool", *request["argv"]]
    code: object = 0
    try:
        main()  # type: ignore[operator]
    except SystemExit as end:
        code = end.code
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    for number in range(3):
        os.close(number)
    return code if isinstance(code, int) else 0 if code is None else 1


if __name__ == "__main__":
    serve(sys.argv[1])
