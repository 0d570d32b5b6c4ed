"""A small run, and the service over it, for the tests of the service."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from small_runs import small_data, small_run
from small_server import free_port, wait_until

from vouch.service.app import create_app
from vouch.service.config import ServiceConfig


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a neighbourhood method: it goes by histories alone and trains at once. Not to be written to."""
    root = tmp_path_factory.mktemp("shop")
    (root / "pictures").mkdir()
    for number in range(1, 40, 2):
        (root / "pictures" / f"{number}.png").write_bytes(b"\x89PNG" + bytes(8))
    return small_run(root / "best", "itemknn", small_data(root / "pictures"))


@pytest.fixture
def runs(run_folder: Path, tmp_path: Path) -> Path:
    """A folder with the run `best`, to do as one pleases."""
    shutil.copytree(run_folder, tmp_path / "runs" / "best")
    return tmp_path / "runs"


Start = Callable[..., TestClient]


@contextlib.contextmanager
def starting(runs: Path) -> Iterator[Start]:
    """A function that starts a service over the run with some settings, and gives a client of it."""
    with contextlib.ExitStack() as stack:

        def begin(open_engine: Any = None, **settings: Any) -> TestClient:
            values = {"run": runs / "best", "hosts": ("testserver",), "requests_per_second": 0, **settings}
            app = create_app(ServiceConfig(**values), open_engine)
            return stack.enter_context(TestClient(app, raise_server_exceptions=False))

        yield begin


@pytest.fixture
def start(runs: Path) -> Iterator[Start]:
    with starting(runs) as begin:
        yield begin


@pytest.fixture
def client(start: Start) -> TestClient:
    return start()


@pytest.fixture(scope="module")
def start_shared(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """`start`, for tests that leave nothing behind."""
    runs = tmp_path_factory.mktemp("shared")
    shutil.copytree(run_folder, runs / "best")
    with starting(runs) as begin:
        yield begin


@pytest.fixture(scope="module")
def shared(start_shared: Start) -> TestClient:
    """`client`, for tests that leave nothing behind."""
    return start_shared()


# PostgreSQL ---------------------------------------------------------------------------------------------------------


def _postgres_bin() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


class PostgresServer:
    """A real server in a folder of its own, reached through a socket there."""

    def __init__(self, bin: Path, folder: Path, user: str | None) -> None:
        self.bin, self.folder, self.user = bin, folder, user
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def _as_user(self) -> dict[str, Any]:
        return {"user": self.user, "group": self.user, "extra_groups": [], "cwd": self.folder} if self.user else {}

    def make(self) -> None:
        words = [
            self.bin / "initdb",
            "-D",
            self.folder / "data",
            "-U",
            "vouch",
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--no-sync",
        ]
        subprocess.run(words, check=True, capture_output=True, **self._as_user)

    def start(self) -> None:
        words = [self.bin / "postgres", "-D", self.folder / "data", "-p", str(self.port), "-k", self.folder]
        words += ["-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=16MB", "-c", "fsync=off"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(words, stdout=quiet, stderr=quiet, **self._as_user)
        ready = [self.bin / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        wait_until(lambda: subprocess.run(ready).returncode == 0)

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGQUIT)  # at once: connections break, as in a crash
            self.process.wait(30)
            self.process = None

    def empty(self) -> str:
        """The URL of a database, emptied."""
        import psycopg

        url = f"postgresql://vouch@127.0.0.1:{self.port}/postgres"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
        return url


def _is_user(name: str) -> bool:
    import pwd

    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A real PostgreSQL server, where its binaries are present."""
    bin = _postgres_bin()
    if bin is None:
        pytest.skip("no PostgreSQL here: initdb is neither in /usr/lib/postgresql/*/bin nor on the path")
    root = os.geteuid() == 0
    if root and not _is_user("postgres"):
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
    with tempfile.TemporaryDirectory(prefix="vouch-pg-") as name:
        folder = Path(name)
        if root:
            shutil.chown(folder, "postgres", "postgres")
        server = PostgresServer(bin, folder, "postgres" if root else None)
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
