"""A PostgreSQL cluster of the tests' own: made with initdb, on a spare loopback port, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pacs import free_port


def postgres_programs() -> Path | None:
    """Return the folder of initdb, pg_ctl and postgres: the newest of Debian's, else the one on PATH, else None."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if versions:
        return versions[-1].parent
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else None


@contextmanager
def postgres_cluster(folder: Path) -> Iterator[str]:
    """Start a cluster in `folder` and yield the SQLAlchemy URL of its database "postgres"; stop it on exit.

    PostgreSQL refuses to run as root, so a root caller's cluster belongs to another user, who must be able to reach
    `folder`. fsync is off: the tests kill processes, not the machine.
    """
    programs = postgres_programs()
    if programs is None:
        raise RuntimeError("PostgreSQL is not installed (apt-get install postgresql)")
    identity: dict[str, object] = {"cwd": folder}
    if os.geteuid() == 0:
        names = {entry.pw_name: entry for entry in pwd.getpwall()}
        user = names.get("postgres") or names["nobody"]
        os.chown(folder, user.pw_uid, user.pw_gid)
        identity |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = folder / "data"
    initdb = [programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-E", "UTF8", "--locale=C", "--no-sync"]
    subprocess.run(initdb, check=True, stdout=subprocess.DEVNULL, **identity)  # type: ignore[call-overload]
    port = free_port()
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200 -c timezone=Asia/Kolkata"
    control = [programs / "pg_ctl", "-D", data, "-w"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # the server keeps what it inherits open
    subprocess.run([*control, "-l", folder / "log", "-o", options, "start"], check=True, **quiet, **identity)  # type: ignore[call-overload]
    try:
        yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, **quiet, **identity)  # type: ignore[call-overload]
