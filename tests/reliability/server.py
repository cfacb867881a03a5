"""A process that has imported lycotool once and runs its command line in forked children.

Started by :mod:`reliability.lab`. Reads one JSON request a line on standard input, answers
each with one line: how the children ended, what it took. A child is a process of its own in
everything the tests look at: signals, exit code, descriptors, limits, memory.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import io
import json
import os
import pkgutil
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from prepared import build_commands_once, get_ready_to_fork

#: Exit code of a child that did what no command may do.
VIOLATION = 99

#: What no command ever does, by the names of Python's audit events.
_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname",
    "urllib.Request", "pickle.find_class", "shutil.unpack_archive", "webbrowser.open",
)  # fmt: skip


def main() -> None:
    """Import everything, then serve until standard input ends."""
    can_mount = _own_mounts()
    _import_everything()
    build_commands_once()
    _warm_up()
    get_ready_to_fork()
    shim = ctypes.CDLL(os.environ["LD_PRELOAD"]) if os.environ.get("LD_PRELOAD") else None
    if shim is not None:
        shim.faults_name.restype = ctypes.c_char_p
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "mount" in request:
            answer: dict[str, object] = {
                "mounted": can_mount and _mount(request["mount"], request["kilobytes"], request["image"])
            }
        elif "unmount" in request:
            answer = {"unmounted": _LIBC.umount2(request["unmount"].encode(), 0) == 0}
        else:
            answer = _serve(request, shim)
        print(json.dumps(answer), flush=True)


_LIBC = ctypes.CDLL(None, use_errno=True)

#: From <sched.h> and <sys/mount.h>.
_NEW_MOUNTS, _NEW_USERS, _RECURSIVE, _PRIVATE = 0x20000, 0x10000000, 0x4000, 0x40000


def _own_mounts() -> bool:
    """Leave the system's table of mounts for a copy; whether that was allowed.

    Without privileges it takes users of its own too, among whom this process is who it was.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_NEW_MOUNTS) != 0:
        if _LIBC.unshare(_NEW_USERS | _NEW_MOUNTS) != 0:
            return False
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(content)
    return _LIBC.mount(b"none", b"/", None, _RECURSIVE | _PRIVATE, None) == 0


def _mount(folder: str, kilobytes: int, image: str | None) -> bool:
    """Mount a file system in memory, or a new ext4 in an image of that size by a loop device."""
    if image is not None:
        with Path(image).open("wb") as file:
            file.truncate(1024 * kilobytes)
        commands = (
            ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", image],
            ["mount", "-o", "loop", image, folder],
        )
        return all(
            shutil.which(command[0]) is not None
            and subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode
            == 0
            for command in commands
        )
    return _LIBC.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={kilobytes}k,mode=755".encode()) == 0


def _import_everything() -> None:
    import torch

    import lycotool

    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(lycotool.__path__, "lycotool."):
        if not module.name.endswith("__main__") and ".training" not in module.name:
            importlib.import_module(module.name)


def _warm_up() -> None:
    """Run commands once here, for what is imported and set up at first use; every child has it then."""
    import torch
    from safetensors.torch import save_file

    from lycotool.cli import app

    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{module}.lora_up.weight": torch.ones(4, 2), f"{module}.lora_down.weight": torch.ones(2, 4)}
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        save_file(state, "a.safetensors")
        save_file({"unet.a.weight": torch.ones(4, 4)}, "b.safetensors")
        for argv in (
            ["inspect", "a.safetensors", "--check"],
            ["merge", "a.safetensors", "a.safetensors", "-o", "merged.safetensors"],
            ["resize", "a.safetensors", "--rank", "1", "-o", "resized.safetensors"],
            ["convert", "a.safetensors", "--to", "diffusers", "--arch", "sd1", "-o", "converted.safetensors"],
        ):
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
                app(argv)
        os.chdir(before)


def _serve(request: dict[str, object], shim: ctypes.CDLL | None) -> dict[str, object]:
    start = time.monotonic()
    children: dict[int, int] = {}  # pidfd -> pid
    for number in range(int(request["copies"])):
        pid = os.fork()
        if pid == 0:
            _child(request, number, shim)  # does not return
        children[os.pidfd_open(pid)] = pid
    statuses: dict[int, int] = {}
    processor = 0.0
    idle = peak = _anonymous(os.getpid())
    if request["kill_after"] is not None:
        time.sleep(request["kill_after"])
        os.kill(next(iter(children.values())), request["kill_with"])
    deadline = start + request["timeout"]
    waiting = dict(children)
    is_late = False
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], 0.01)
        for descriptor in ready:
            pid = waiting.pop(descriptor)
            os.close(descriptor)
            _, statuses[pid], used = os.wait4(pid, 0)
            processor += used.ru_utime + used.ru_stime
        peak = max([peak, *(_anonymous(pid) for pid in waiting.values())])
        if waiting and time.monotonic() > deadline:
            is_late = True
            for pid in waiting.values():
                os.kill(pid, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(statuses[pid]) for pid in children.values()]
    return {
        "codes": codes,
        "seconds": time.monotonic() - start,
        "processor": processor,
        "peak": peak - idle,
        "idle": idle,
        "late": is_late,
    }


def _anonymous(pid: int) -> int:
    """Bytes of memory that no file backs; what a command really needs."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _child(request: dict[str, object], number: int, shim: ctypes.CDLL | None) -> None:
    code = 1
    try:
        code = _run(request, number, shim)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a program
        traceback.print_exc()
    finally:
        os._exit(code)


def _run(request: dict[str, object], number: int, shim: ctypes.CDLL | None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    tempfile.tempdir = None
    _redirect(0, request["stdin"] or os.devnull, os.O_RDONLY)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        _redirect(descriptor, f"{request[name]}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for name, limit in request["limits"].items():
        allowed = limit + (_address_space() if name == "AS" else 0)
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (allowed, allowed))
    if request["threads"] > 1:
        importlib.import_module("torch").set_num_threads(request["threads"])
    if request["patch"]:
        _patch(*request["patch"].split(":"))
    if request["unprivileged"] or os.getuid() != 0:  # who is not root is among users of its own
        _drop_capabilities()
    sys.argv = ["lycotool", *(part.replace("{copy}", str(number + 1)) for part in request["argv"])]
    _guard([str(folder) for folder in request["writable"]])
    if shim is not None:
        fault = request["fault"]
        shim.faults_arm(request["cwd"].encode(), ctypes.c_long(fault["nth"]), fault["action"], fault["value"])
        shim.faults_maps(request["maps"])
    code = _main()
    if shim is not None and request["trace"]:
        names = [shim.faults_name(ctypes.c_long(i)).decode() for i in range(shim.faults_count())]
        shim.faults_arm(b"/nowhere", ctypes.c_long(0), 0, 0)
        Path(request["trace"]).write_text("\n".join(names))
    return code


def _main() -> int:
    from lycotool.cli import main as command_line

    code = 0
    try:
        if sys.argv[1:2] == ["--python"]:  # a test of the guard itself
            exec(sys.argv[2])
        else:
            command_line()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - the interpreter would print it so
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    return code


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _patch(function: str, error: str) -> None:
    """Let a function raise."""
    module, _, name = function.rpartition(".")
    where, _, kind = error.rpartition(".")

    def raising(*arguments: object, **more: object) -> None:
        raise getattr(importlib.import_module(where), kind)("simulated")

    setattr(importlib.import_module(module), name, raising)


def _redirect(descriptor: int, path: str, flags: int) -> None:
    opened = os.open(path, flags, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def _drop_capabilities() -> None:
    """Make root subject to permissions, as other users are."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if _LIBC.capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _guard(writable: list[str]) -> None:
    """End the process at once if it runs a program, uses the network, or writes elsewhere."""
    roots = (*tuple(os.path.realpath(folder) + "/" for folder in writable), "/dev/null", "/proc/self/fd/")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            if isinstance(path, str | bytes) and not (os.path.realpath(os.fsdecode(path)) + "/").startswith(
                roots
            ):
                _violate(event, arguments)
        elif event in _FORBIDDEN:
            _violate(event, arguments)

    sys.addaudithook(hook)


def _violate(event: str, arguments: tuple[object, ...]) -> None:
    os.write(2, f"VIOLATION {event} {arguments!r}\n".encode())
    os._exit(VIOLATION)


if __name__ == "__main__":
    main()
