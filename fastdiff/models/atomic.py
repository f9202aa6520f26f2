"""Files that are whole or absent."""

import os
import secrets
from pathlib import Path


def write_atomic(path: str | os.PathLike, chunks: list[bytes | memoryview]) -> None:
    """Write the chunks to a temporary file in the same folder, sync it, rename it to `path`, sync the folder."""
    path = Path(path).absolute()
    temp = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            for chunk in chunks:
                view = memoryview(chunk)
                while view.nbytes:
                    view = view[os.write(fd, view) :]
            os.fchmod(fd, 0o644)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
