"""Reads the structure of NVlabs' StyleGAN pickles without running them.

A pickle is a program: it may call whatever it can name. Here it can name a few things only, and each of them is a
stand-in that holds data: a module's Python source, which these files carry, stays a string. `checked` looks at every
opcode first, so that truncated files and opcodes that NVlabs' files don't have are refused before anything is built.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..errors import InputError

DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
REFUSED_OPCODES = {"INST", "OBJ", "EXT1", "EXT2", "EXT4", "FROZENSET", "NEXT_BUFFER", "READONLY_BUFFER"}
MEMO_OPCODES = {"PUT", "BINPUT", "LONG_BINPUT"}
TUPLE_OPCODES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
LONGEST_HEADER = 4096
"""Bytes before the numbers of a storage; PyTorch writes about 250."""
MOST_TUPLES = 20_000
"""In one pickle; NVlabs' have about 5,000. Tuples in tuples without end would overflow the interpreter's stack."""


class Sealed:
    """What a pickle can make but not change."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of an object that has none")


class Unread(Sealed):
    """Stands for what the generator does not need: NumPy's numbers and arrays, sets, devices. Holds nothing."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Unread:
        return self

    def __setstate__(self, state: Any) -> None:
        pass


class Named(Sealed):
    """Stands for a function that a pickle calls by its name."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class Table(dict):
    """Stands for `OrderedDict` and for NVlabs' `EasyDict`."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        if state:
            raise pickle.UnpicklingError("it sets attributes of a dict")


class StoredObject(Sealed):
    """Stands for one of NVlabs' persistent objects: its class's name, and its state `{attribute: value}`."""

    __slots__ = ("class_name", "state")

    def __init__(self, meta: Any) -> None:
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            raise pickle.UnpicklingError("a persistent object has no state")
        self.class_name, self.state = meta.get("class_name"), meta["state"]


class Storage(Sealed):
    """Numbers of one type, as bytes."""

    __slots__ = ("count", "data", "dtype")

    def __init__(self, data: memoryview, dtype: torch.dtype) -> None:
        self.data, self.dtype, self.count = data, dtype, len(data) // dtype.itemsize


class StoredTensor(Sealed):
    """A view of a storage that is known to lie in it, and to be no larger."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any) -> None:
        if not (isinstance(storage, Storage) and _natural([offset]) and _natural(size) and _natural(stride)):
            raise pickle.UnpicklingError("a tensor is described by what are no numbers")
        count = 1
        for n in size:
            count *= n
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else offset
        if count > storage.count or last >= max(storage.count, 1):
            raise pickle.UnpicklingError("a tensor is larger than what is stored of it")
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def tensor(self) -> torch.Tensor:
        """A copy of it in fp32."""
        if not self.storage.count:
            return torch.zeros(self.size)
        flat = torch.frombuffer(bytearray(self.storage.data), dtype=self.storage.dtype)
        return flat.as_strided(self.size, self.stride, self.offset).float().contiguous().clone()


def _natural(values: Any) -> bool:
    """Whether these are a few whole numbers from 0 on."""
    if not isinstance(values, (tuple, list)) or len(values) > 8:
        return False
    return all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**48 for v in values)


def _rebuilt_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> StoredTensor:
    return StoredTensor(storage, offset, size, stride)


def _rebuilt_parameter(tensor: Any, *rest: Any) -> Any:
    return tensor


class _StorageReader(pickle.Unpickler):
    """Reads what `torch.save` writes of a storage; a storage is named by a persistent id."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise _refused(module, name)

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int]:
        match pid:
            case ("storage", torch.dtype() as dtype, str(), str(), int(count), None):
                return dtype, count
        raise pickle.UnpicklingError("a storage has another form than PyTorch's")


def read_storage(data: Any) -> Storage:
    """The storage in the bytes that `torch.save(storage, _use_new_zipfile_serialization=False)` wrote."""
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a storage is no bytes")
    file = io.BytesIO(data[:LONGEST_HEADER])
    for _ in range(5):
        check_opcodes(file)
    end = file.tell()
    file.seek(0)
    _magic, _protocol, _system, found, _keys = (_StorageReader(file).load() for _ in range(5))
    if not isinstance(found, tuple) or file.tell() != end or len(data) < end + 8:
        raise pickle.UnpicklingError("a storage has another form than PyTorch's")
    (dtype, count), (stored,) = found, struct.unpack_from("<q", data, end)
    numbers = memoryview(data)[end + 8 :]
    if count != stored or len(numbers) != count * dtype.itemsize:
        raise pickle.UnpicklingError(f"a storage tells of {count} numbers and has {len(numbers)} bytes")
    return Storage(numbers, dtype)


UNREAD = Unread()
ALLOWED: dict[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Named(StoredObject),
    ("collections", "OrderedDict"): Table,
    ("dnnlib.util", "EasyDict"): Table,
    ("torch._utils", "_rebuild_tensor_v2"): Named(_rebuilt_tensor),
    ("torch._utils", "_rebuild_parameter"): Named(_rebuilt_parameter),
    ("torch.storage", "_load_from_bytes"): Named(read_storage),
    **{("torch", name): UNREAD for name in ("Size", "device", "float16", "float32", "float64")},
    **{("numpy", name): UNREAD for name in ("dtype", "ndarray")},
    **{(f"numpy.{core}.multiarray", n): UNREAD for core in ("core", "_core") for n in ("scalar", "_reconstruct")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): UNREAD for core in ("core", "_core")},
    ("builtins", "set"): UNREAD,
}
"""All that a pickle may name, and what stands for it."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise _refused(module, name)
        return ALLOWED[module, name]


def _refused(module: str, name: str) -> pickle.UnpicklingError:
    if module.startswith("dnnlib.tflib"):
        return pickle.UnpicklingError("it is one of TensorFlow's, which NVlabs' legacy.py converts")
    return pickle.UnpicklingError(f"it asks for {module}.{name}, which no StyleGAN2 needs")


def check_opcodes(file: BinaryIO) -> None:
    """Go over the pickle that begins here, up to its end, without running it; raises `UnpicklingError`."""
    tuples = 0
    for i, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in REFUSED_OPCODES:
            raise pickle.UnpicklingError(f"it has the opcode {opcode.name}, which no StyleGAN2 needs")
        if opcode.name in MEMO_OPCODES and not (isinstance(argument, int) and 0 <= argument <= i):
            raise pickle.UnpicklingError(f"it numbers an object {argument}, of which it cannot have so many")
        tuples += opcode.name in TUPLE_OPCODES
        if tuples > MOST_TUPLES:
            raise pickle.UnpicklingError(f"it has more than {MOST_TUPLES} tuples, as no StyleGAN2 has")


def read_pickle(file: Path) -> dict[str, Any]:
    """What a pickle of NVlabs' holds, by name: `G_ema` and others, as `StoredObject`s. None of its code runs.

    Raises `InputError` if it is truncated, or names anything that a StyleGAN2 does not need.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist; pass the path of a .pkl file.")
    with file.open("rb") as stream, _told_of(file):
        check_opcodes(stream)
        stream.seek(0)
        found = _Reader(stream).load()
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no networks by name; pass a .pkl file of stylegan2-ada-pytorch or stylegan3.")
    return found


FAILURES = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError, OverflowError, MemoryError,
    RecursionError, struct.error,
)  # fmt: skip
"""What Python raises where a pickle is not as it should be."""


@contextmanager
def _told_of(file: Path) -> Iterator[None]:
    """Turn what goes wrong with a pickle into one sentence."""
    try:
        yield
    except FAILURES as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")[:200]
        raise InputError(
            f"{file} was not read, and nothing in it was run: {reason}; "
            "fetch the file again, from where it was first published."
        ) from None
