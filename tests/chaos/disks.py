"""The disks that workers keep their states on: lost, damaged, or full."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from pathlib import Path
from typing import Literal, Self, TypeAlias

Harm: TypeAlias = Literal["lost", "cut", "flipped"]

_MOST_BYTES = 2 << 30
_MOUNT_SECONDS = 10
_LOGS_BYTES = 64 << 10
"""Enough for what a worker says before it ends: the limit is on that file too."""

# A mount namespace of its own needs no privileges where a user namespace needs none. Ends when its input does, and the
# mount with it.
_HOLD = """
mount -t tmpfs -o mode=700,size="$2" chaos "$1" && echo mounted
while read -r size; do mount -o "remount,size=$size" "$1" && echo resized; done
"""


class Disk:
    """A disk of its own for states, in memory, that can be made too small.

    Where this machine lets nobody but root mount one, it is a plain folder; then the files in it are what can't grow
    beyond a limit, and RocksDB hears EFBIG for ENOSPC.
    """

    def __init__(self, folder: Path, holder: asyncio.subprocess.Process | None) -> None:
        self.folder = folder
        """Where workers and this process see it."""
        self.largest_file: int | None = None
        """Bytes, a limit that a worker on this disk has to be started with."""
        self._holder = holder

    @classmethod
    async def make(cls, folder: Path) -> Self:
        """On this folder, which is there and empty; its path is an absolute one."""
        try:
            holder = await asyncio.create_subprocess_exec(
                "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _HOLD, "sh", folder, str(_MOST_BYTES),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError:
            return cls(folder, None)
        if await _line(holder) != b"mounted\n":
            await _end(holder)
            return cls(folder, None)
        return cls(Path(f"/proc/{holder.pid}/root{folder}"), holder)

    @property
    def is_real(self) -> bool:
        """Whether it is a disk of its own."""
        return self._holder is not None

    async def fill(self, room: int) -> None:
        """Leave so many bytes; or, on a plain folder, in each file."""
        if self._holder is None:
            self.largest_file = _LOGS_BYTES + room
            return
        disk = os.statvfs(self.folder)
        used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
        await self._resize(max(used + room, disk.f_frsize))  # 0 would be no limit

    async def make_room(self) -> None:
        """As at first."""
        self.largest_file = None
        if self._holder is not None:
            await self._resize(_MOST_BYTES)

    async def _resize(self, size: int) -> None:
        assert self._holder is not None
        assert self._holder.stdin is not None
        self._holder.stdin.write(b"%d\n" % size)
        if await _line(self._holder) != b"resized\n":
            raise OSError(f"{self.folder} can't be given {size} bytes")

    def harm(self, harm: Harm, rng: random.Random) -> None:
        """Lose everything, cut the end off one file, or change bytes in one.

        In a third of the cases in a list of files: RocksDB itself does not miss the end of one.
        """
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.stat().st_size]
        if harm == "lost" or not files:
            for path in self.folder.iterdir():
                shutil.rmtree(path)
            return
        lists = [path for path in files if path.name.startswith("MANIFEST")]
        path = rng.choice(lists if lists and rng.random() < 1 / 3 else files)
        content = bytearray(path.read_bytes())
        if harm == "cut":
            del content[rng.randrange(len(content)) :]
        else:
            for _ in range(8):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    async def close(self) -> None:
        if self._holder is not None:
            await _end(self._holder)


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    async with asyncio.timeout(_MOUNT_SECONDS):
        return await process.stdout.readline()


async def _end(holder: asyncio.subprocess.Process) -> None:
    assert holder.stdin is not None
    holder.stdin.close()
    async with asyncio.timeout(_MOUNT_SECONDS):
        await holder.wait()
