"""States in safetensors files, read and written one tensor at a time: no file needs to fit into memory.

A state is a mapping from the names of a network's tensors to the tensors. `StateFile` is one on disk; `write_state`
streams one to disk. The format is that of safetensors: a length, a JSON header with type, shape and place of every
tensor, then their bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError, StorageError
from vouch.files import atomic_file, read_json

State = Mapping[str, Tensor]
Source = State | nn.Module | str | Path
"""A state, a network that has one, or the path of a safetensors file or of the index of a sharded one."""
Kind = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape of a tensor."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
RECORD = "vouch.merge"
"""Where in a file's header the record is."""
LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}


class StateFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, or of `*.safetensors.index.json`; each is read when it is asked for.

    Raises:
        StorageError: there is no such file, or it is damaged or of another format.
    """

    def __init__(self, path: Path | str) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        if not self.path.is_file():
            raise StorageError(f"there is no file {str(path)!r}", hint="give the path of a .safetensors file")
        parts = [self.path]
        if self.path.suffix == ".json":
            index = read_json(self.path)
            if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
                raise StorageError(f"{self.path.name!r} has no 'weight_map': it is no index of a sharded state")
            parts = [self.path.parent / Path(name).name for name in sorted(set(index["weight_map"].values()))]
        self.parts = parts
        self._part: dict[str, Any] = {}
        self.kinds: dict[str, Kind] = {}
        for part in parts:
            try:
                opened: Any = safe_open(part, framework="pt")
                for name in opened.keys():  # noqa: SIM118 (the handle is no mapping)
                    found = opened.get_slice(name)
                    self.kinds[name] = DTYPES[found.get_dtype()], tuple(found.get_shape())
                    self._part[name] = opened
            except (SafetensorError, OSError, KeyError) as error:
                hint = "write states with safetensors.torch.save_file; pickled files are not read"
                raise StorageError(
                    f"{part.name!r} cannot be read as safetensors: {error}", where=str(part), hint=hint
                ) from error

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._part[name].get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __repr__(self) -> str:
        return f"StateFile({str(self.path)!r}, {len(self)} tensors)"


def open_state(source: Source) -> State:
    """A source as a state: a file by its tensors, a network by its `state_dict`.

    Raises:
        StorageError: the file is not there, or is no safetensors file. ConfigError: it is no source at all.
    """
    if isinstance(source, str | Path):
        return StateFile(source)
    if isinstance(source, nn.Module):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise ConfigError(f"a {type(source).__name__} is no state", hint="give a state dict, a network or a path")
    for name, value in source.items() if not isinstance(source, StateFile) else ():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{name!r} is a {type(value).__name__}, not a tensor",
                hint="give the state dict itself, such as module.state_dict()",
            )
    return source


def kinds(state: State) -> dict[str, Kind]:
    """Type and shape of every tensor, without reading any."""
    if isinstance(state, StateFile):
        return state.kinds
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}


def file_order(layout: Mapping[str, Kind]) -> list[str]:
    """The names as a file has them: wide types first, so that every tensor is aligned; then by name."""
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))


def write_state(
    path: Path | str,
    layout: Mapping[str, Kind],
    tensors: Iterable[tuple[str, Tensor]],
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write a safetensors file from tensors that come in `file_order`; it appears only when all are there.

    A `record` of how they were made, plain JSON, is kept in the header: see `read_record`.

    Raises:
        StorageError: the file cannot be written. DataError: a tensor is not what `layout` says, or its type has no
            name in the format.
    """
    about = {"format": "pt"} if record is None else {"format": "pt", RECORD: json.dumps(record, allow_nan=False)}
    order, place, header = file_order(layout), 0, dict[str, Any]({"__metadata__": about})
    for name in order:
        dtype, shape = layout[name]
        if dtype not in LETTERS:
            raise DataError(f"{name!r} is of type {dtype}, which safetensors files cannot hold")
        size = dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": LETTERS[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as aside, open(aside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        waiting = iter(order)
        for name, tensor in tensors:
            if name != next(waiting, None) or layout[name] != (tensor.dtype, tuple(tensor.shape)):
                raise DataError(f"{name!r} ({tensor.dtype}, {tuple(tensor.shape)}) was not to be written here")
            file.write(_bytes(tensor))
        if (missing := next(waiting, None)) is not None:
            raise DataError(f"{missing!r} was not given")


def read_record(path: Path | str) -> dict[str, Any]:
    """How the state in a file was merged: method, settings, coefficients, and the hashes of what it was made from.

    Raises:
        StorageError: the file is not there, is no safetensors file, or has no such record.
    """
    from safetensors import safe_open

    with safe_open(StateFile(path).parts[0], framework="pt") as file:
        about = file.metadata() or {}
    if RECORD not in about:
        raise StorageError(f"{Path(path).name!r} has no record of a merge", where=str(path))
    record: dict[str, Any] = json.loads(about[RECORD])
    return record


def fingerprint(state: State) -> dict[str, str]:
    """What a state is: of a file its path and the sha256 of its bytes, else the sha256 of names, types and values."""
    digest = hashlib.sha256()
    if isinstance(state, StateFile):
        for part in state.parts:
            with open(part, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return {"path": str(state.path), "sha256": digest.hexdigest()}
    for name, (dtype, shape) in sorted(kinds(state).items()):
        digest.update(f"{name} {dtype} {shape}\n".encode())
        digest.update(_bytes(state[name]))
    return {"sha256": digest.hexdigest()}


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_state(path: Path | str, state: State) -> None:
    """Write a state to a safetensors file; tensors that share memory are written one by one in full.

    Raises:
        StorageError: the file cannot be written.
    """
    layout = kinds(state)
    write_state(path, layout, ((name, state[name]) for name in file_order(layout)))
