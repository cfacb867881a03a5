"""PyTorch pickles, read only on request and only with ``weights_only=True``.

This is the one place of the package that calls ``torch.load``.
"""

from __future__ import annotations

from pathlib import Path

from lycotool.errors import BadInputError, UnsafeError
from lycotool.io.dtypes import has_name
from lycotool.io.memory import MemoryFile
from lycotool.lazy import torch


def is_pickle(path: Path) -> bool:
    """Whether the file's first bytes are those of a PyTorch zip or a bare pickle."""
    with path.open("rb") as file:
        start = file.read(8)
    if start[3:8] == bytes(5):  # the length of a safetensors header, which can begin as a pickle does
        return False
    return start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05")


class PickleFile(MemoryFile):
    """The tensors of a PyTorch pickle, held in memory.

    Raises
    ------
    UnsafeError
        If the pickle names anything but tensors and plain containers.
    BadInputError
        If it is damaged, compressed, or not a map of names to tensors.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, _load(path), {})


def _globals(path: Path) -> list[str]:
    """What a bare pickle would import, found by reading its instructions, not running them."""
    import pickletools

    found: list[str] = []
    strings: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(path.read_bytes()):
            if isinstance(argument, str):
                strings.append(argument)
            if operation.name == "GLOBAL":
                found.append(str(argument).replace(" ", "."))
            elif operation.name == "STACK_GLOBAL":
                found.append(".".join(strings[-2:]))
    except Exception:  # noqa: BLE001 - the instructions may be cut anywhere
        return found
    return found


def _load(path: Path) -> dict[str, torch.Tensor]:
    import pickle
    import re
    import warnings
    import zipfile

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise BadInputError("a compressed archive; torch.save never compresses", path=path)
        with warnings.catch_warnings():  # what is unusual about it ends in an error
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        wanted = [named[1]] if named else _globals(path)
        raise UnsafeError(
            f"the pickle asks for more than tensors: {', '.join(wanted) or 'unsupported instructions'}",
            path=path,
        ) from None
    except (BadInputError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - the unpickler fails in any way on damaged bytes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(f"a truncated or damaged pickle: {reason}", path=path) from None
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not isinstance(found, dict):
        raise BadInputError("not a state dict: the pickle holds no map of tensors", path=path)
    tensors = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise BadInputError("not a state dict: the pickle holds no tensors", path=path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or not has_name(tensor.dtype):
            raise BadInputError(f"is {tensor.dtype}, which no file of weights holds", path=path, key=name)
    return tensors
