"""Checksums of arrays, the same in every process."""

import re
import zlib

import numpy as np
import torch

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # of an object in its repr; another in each process


def crc32_of(array, checksum=0):
    """Returns the CRC-32 of an array's values, going on from a checksum."""
    try:
        content = bytes_of(array)
    except (RuntimeError, TypeError, NotImplementedError):  # of a nested tensor, or one on the meta device
        content = f"{array.layout} {array.dim()} {array.dtype}".encode()
    return zlib.crc32(content, checksum)


def bytes_of(array):
    """Returns the values of a tensor (dense or sparse) or of an array (objects included) as a buffer."""
    if torch.is_tensor(array):
        array = array.detach().resolve_conj().resolve_neg()
        array = array if array.layout == torch.strided else array.to_dense()
        return array.cpu().contiguous().flatten().view(torch.uint8).numpy()
    if array.dtype.hasobject:
        parts = (crc32_of(each) if isinstance(each, torch.Tensor | np.ndarray) else repr(each) for each in array.flat)
        return ADDRESS.sub("", f"{array.shape} {' '.join(map(str, parts))}").encode(errors="replace")
    return np.ascontiguousarray(array)


def crc32_of_file(path, size, pieces=16, length=2**14):
    """Returns the CRC-32 of a file, or of evenly spaced pieces of one larger than pieces × length bytes."""
    checksum = 0
    with open(path, "rb") as file:
        for start in range(0, size, max(length, size // pieces)):
            file.seek(start)
            checksum = zlib.crc32(file.read(length), checksum)
    return checksum
