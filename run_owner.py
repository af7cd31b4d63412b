"""One owner per run folder, so that no two trainings write into the same one.

OUT/owner.json names the process that trains into OUT, which touches the file while it lives. An owner on the same host is
judged by its process id and start time, one on another host by its last touch.
"""

import atexit
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import socket
import subprocess
import threading
import time
import uuid

from common import UserError, line_of, printable, rank_and_size

HEARTBEAT = 10.0  # seconds between two touches
STALE = 60.0  # seconds without a touch, after which an owner on another host counts as dead
OWNED: dict[str, dict] = {}  # folder -> what this process wrote into its owner.json


def own_run(folder: pathlib.Path):
    """Make this process the owner of `folder` until it ends; the first rank does so for all.

    Raises UserError, which names the host, the process id and the age, if another process owns it and lives, or if the files
    cannot be written. Of two processes that start at once, the second one waits for the lock and then finds the first one's
    file.
    """
    real = os.path.realpath(folder)
    if rank_and_size()[0] > 0 or real in OWNED:
        return
    path, me = folder / "owner.json", identity()
    try:
        take_over(folder, path, me)
    except OSError as error:  # of another user, or of a network disk without locks
        raise UserError(
            f"--out {printable(folder)}: cannot be owned ({printable(error.filename or '.owner.lock')}: {error.strerror}); "
            "free some space or give access, or give another --out"
        ) from None
    OWNED[real] = me
    ended = threading.Event()
    threading.Thread(target=touch_until, args=(ended, path, me), daemon=True).start()
    atexit.register(disown, ended, path, me)


def take_over(folder: pathlib.Path, path: pathlib.Path, me: dict):
    """Put `me` into owner.json, under a lock, unless an owner lives, which is a UserError."""
    with open(folder / ".owner.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.utime(lock.fileno())
        now = os.fstat(lock.fileno()).st_mtime  # by the clock of the disk, which dates the touches too
        owner = read_owner(path) or {}
        with contextlib.suppress(FileNotFoundError):  # it has just ended, or there is none
            if lives(owner, now - path.stat().st_mtime):
                raise UserError(
                    f"--out {printable(folder)}: process {owner.get('pid')} on {printable(owner.get('host', '?'))} has been "
                    f"training into it for {age_of(owner)}; wait for it, stop it, or give another --out"
                )
        temporary = path.with_name(f".owner-{me['id']}.tmp")
        try:
            temporary.write_text(json.dumps(me))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        if isinstance(pid := owner.get("pid"), int):  # a kill leaves the file of `atomic_write`, as large as a checkpoint
            for left in folder.glob(f".mgd-{pid}-*.tmp"):
                left.unlink(missing_ok=True)


def age_of(owner: dict) -> str:
    """How long an owner has owned its folder, as h:mm:ss, or what to say where its file does not tell."""
    try:
        return str(datetime.timedelta(seconds=round(time.time() - owner["since"])))
    except (KeyError, TypeError, ValueError, OverflowError):
        return "an unknown time"


def refuse_lost(folder: pathlib.Path):
    """Raise UserError if another process has taken over a folder that this one owned, such as while this one was suspended."""
    me = OWNED.get(os.path.realpath(folder))
    if me and read_owner(folder / "owner.json") != me:
        raise UserError(
            f"{printable(folder)}: another process has taken it over, or removed its owner.json; this one ends without writing"
        )


def identity() -> dict:
    """What names this process: host, boot and process namespace, process id, start time, and a random id."""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return {
        "host": socket.gethostname(),
        "boot": (boot.read_text().strip() if boot.exists() else "") + namespace,
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "since": time.time(),
        "id": uuid.uuid4().hex,
    }


def read_owner(path: pathlib.Path) -> dict | None:
    """What owner.json says, {} if it cannot be understood, None if there is none."""
    try:
        owner = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def lives(owner: dict, untouched: float) -> bool:
    """Whether the owner, whose file was touched `untouched` seconds ago, lives."""
    me = identity()
    if all(owner.get(key) == me[key] for key in ("host", "boot")):
        return owner.get("started") == start_time(owner.get("pid")) is not None
    return untouched < STALE


def start_time(pid: int | None) -> str | None:
    """When a process of this host began, in a form to compare; None if there is none. A process id alone is given again."""
    if stat := line_of(f"/proc/{pid}/stat", f"{pid} "):
        state, *fields = stat.rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # clock ticks after boot; a zombie is dead
    if os.path.exists("/proc/self/stat"):
        return None
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)  # macOS
    return shown.stdout.strip() or None


def touch_until(ended: threading.Event, path: pathlib.Path, me: dict):
    """Touch owner.json every HEARTBEAT seconds, as long as it is this process's."""
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            if read_owner(path) == me:
                os.utime(path)


def disown(ended: threading.Event, path: pathlib.Path, me: dict):
    """Remove owner.json at the end, unless another process has taken it over."""
    ended.set()
    with contextlib.suppress(OSError):
        if read_owner(path) == me:
            path.unlink()
