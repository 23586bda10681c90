"""The mark of a running training in its folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

LOCK_NAME = ".compressm_running"


def mark_active(output_dir: str | os.PathLike) -> None:
    """Mark for other processes that a training writes to a folder, until [`mark_ended`] or the end of this process."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "start": _start_of(os.getpid())}
        (Path(output_dir) / LOCK_NAME).write_text(json.dumps(owner), encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written to: %s", output_dir, error)


def mark_ended(output_dir: str | os.PathLike) -> None:
    """Remove the mark of [`mark_active`]."""
    with contextlib.suppress(OSError):
        (Path(output_dir) / LOCK_NAME).unlink(missing_ok=True)


def is_active(output_dir: str | os.PathLike) -> bool:
    """Whether another process of this machine that still runs has marked a folder as its own."""
    try:
        owner = json.loads((Path(output_dir) / LOCK_NAME).read_text(encoding="utf-8"))
        if owner["host"] != socket.gethostname() or owner["pid"] == os.getpid():
            return False
        pid, start = int(owner["pid"]), owner.get("start")
        # Not by signal 0, which on Windows is Ctrl+C.
        if not psutil.pid_exists(pid):
            return False
    except (OSError, OverflowError, ValueError, KeyError, TypeError):
        return False
    found = _start_of(pid)
    # Marks of earlier versions of this library have no start.
    return start is None or found is None or start == found


def _start_of(pid: int) -> str | None:
    """
    When a process started, which another one that gets its number later does not share; None where it is unknown.

    One that has ended, and whose parent has not asked for its outcome yet, has its number but is no training any more.
    """
    try:
        # In clock ticks since this boot: unlike a date, no correction of the clock changes them. The name, in
        # parentheses, may hold spaces.
        values = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return "ended" if values[0] in "ZX" else f"{boot} {values[19]}"
    except (OSError, IndexError):
        pass
    try:
        return str(psutil.Process(pid).create_time())
    except (psutil.Error, ValueError):
        return None
