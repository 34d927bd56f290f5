"""A safetensors file that is written one tensor at a time and carries its own sha256.

    8 bytes n, little-endian      n bytes of JSON, the header, with spaces at its end      the tensors, one after the other
    __metadata__.sha256 = sha256(the whole file, with 64 zeros in that place)

The library writes a file from tensors that are all there at once; those of quantized.safetensors are made one after the other,
and none need stay: what saving takes above the model is then one matrix. As in the library's files, wide elements come first,
so that each tensor lies at a multiple of its own size. Any reader of safetensors reads it.
"""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint16: "U16",
    torch.uint8: "U8",
}
PLACE = b'"sha256":"'
ZEROS = "0" * 64
PIECE = 1 << 18  # bytes at a time


def write(file: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Callable[[], dict[str, str]]) -> None:
    """Write (name, tensor) pairs as they come, any device, and then the metadata, which may depend on them.

    Takes the bytes of the tensors on the disk twice while it runs. Raises OSError as files do, KeyError for another dtype.
    """
    entries, sizes = {}, {}
    with tempfile.TemporaryFile(dir=file.parent) as body, file.open("wb") as out:
        for name, t in tensors:
            raw = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            entries[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape)}
            sizes[name] = t.element_size(), body.tell(), raw.nbytes
            body.write(raw)
        order, end = sorted(sizes, key=lambda name: (-sizes[name][0], name)), 0
        for name in order:
            entries[name]["data_offsets"] = [end, end := end + sizes[name][2]]
        made = {"__metadata__": {"sha256": ZEROS, **metadata()}} | {name: entries[name] for name in order}
        header = json.dumps(made, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        head, digest = len(header).to_bytes(8, "little") + header, hashlib.sha256()
        digest.update(head)
        out.write(head)
        for name in order:
            _, start, left = sizes[name]
            body.seek(start)
            while left:
                piece = body.read(min(PIECE, left))
                digest.update(piece)
                out.write(piece)
                left -= len(piece)
        out.seek(head.index(PLACE) + len(PLACE))
        out.write(digest.hexdigest().encode())


@contextmanager
def read(file: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """`with read(file) as (tensors, metadata)`: of a file that `write` has written, tensors on the CPU. What the body makes of
    them may be used after it, not in it: only then is the sha256 known to be right. Raises ValueError if it is not, whatever
    the body has raised, or if the file is none of `write`."""
    with meanwhile(lambda: intact(file)):
        try:
            with safe_open(file, "pt") as f:
                found = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: {error}") from None
        yield found


def intact(file: Path) -> None:
    """Raises ValueError if a file is not what `write` has written, bit for bit."""
    try:
        with mapped(file) as whole:
            size = int.from_bytes(whole[:8], "little")
            if size > len(whole):
                raise ValueError(f"{file} is no safetensors file, or a truncated one")
            head = bytes(whole[: 8 + size])
            if PLACE not in head:
                raise ValueError(f"{file}: no model that stands alone, with its own sha256 in its metadata")
            place = head.index(PLACE) + len(PLACE)
            found = head[place : place + 64]
            digest = hashlib.sha256(head[:place] + ZEROS.encode())
            digest.update(whole[place + 64 :])
    except OSError as error:
        raise ValueError(f"{file}: {error}") from None
    if digest.hexdigest().encode() != found:
        raise ValueError(f"{file} is truncated or altered (its sha256 is not the one in its metadata)")


@contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The bytes of a file, read where they are asked for. A hash of all at once lets other threads run while it is made; one
    of pieces asks for Python's lock between them, and waits up to 5 ms for each. Raises OSError as files do."""
    with file.open("rb") as f:
        if not os.fstat(f.fileno()).st_size:  # which mmap refuses
            yield memoryview(b"")
            return
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m, memoryview(m) as whole:
            yield whole


@contextmanager
def meanwhile(verify: Callable[[], None]) -> Iterator[None]:
    """Run the body while a thread verifies what the body reads: hashing is most of the time that reading takes. What `verify`
    raises comes first, since damage may be why the body has raised."""
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify)
        try:
            yield
        except Exception:
            verified.result()
            raise
        verified.result()
