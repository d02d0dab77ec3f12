"""Uploads and downloads against servers on loopback that speak as Amazon's and Google's stores do, and as they fail.

The servers are moto and gcp-storage-emulator; without them these tests are skipped. Failures come from a proxy before
them, which answers 500, stalls, cuts answers short or hangs up.
"""

import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from toyrun import resolved, run, toy_files

from wrinklefree.core.errors import UserError
from wrinklefree.training import storage, uploads

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the servers and the drivers are theirs

BUCKET = "wf-tests"


class Proxy(ThreadingHTTPServer):
    """Hands requests on to `target`, unless it is told to fail: `how` is 500, stall, cut, gone or closed."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.how, self.requests = target, "", 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def answer(self) -> None:
        self.server.requests += 1
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        how = self.server.how
        if how == "gone":
            self.connection.close()
            return
        if how == "stall":
            time.sleep(3)
            self.connection.close()
            return
        if how == "closed" and self.command in ("PUT", "POST"):
            self._send(403, {}, b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>")
            return
        if how == "500":
            self._send(500, {}, b"<Error><Code>InternalError</Code></Error>")
            return
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("host", "content-length", "transfer-encoding")
        }
        headers.setdefault("Content-Type", "application/octet-stream")  # or else urllib says that it is a form
        request = urllib.request.Request(self.server.target + self.path, body, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                self._send(answer.status, dict(answer.headers), answer.read(), cut=how == "cut")
        except urllib.error.HTTPError as error:
            self._send(error.code, dict(error.headers), error.read())

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, code: int, headers: dict[str, str], body: bytes, cut: bool = False) -> None:
        self.send_response(code)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        told = {name.lower(): value for name, value in headers.items()}
        length = told.get("content-length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.connection.close()


for method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
    setattr(Handler, f"do_{method}", Handler.answer)


@pytest.fixture(scope="module")
def amazon() -> Iterator[Proxy]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy(f"http://{host}:{port}")
    variables = {
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        _forget("s3")
        import s3fs

        s3fs.S3FileSystem().mkdir(BUCKET)
        yield proxy
        _forget("s3")
    server.stop()


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    pytest.importorskip("gcsfs")
    create = pytest.importorskip("gcp_storage_emulator.server").create_server
    server = create("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    server.start()
    port = server._api._httpd.server_port if hasattr(server._api, "_httpd") else server._api._port
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        _forget("gs")
        yield f"gs://{BUCKET}"
        _forget("gs")
    server.stop()


def _forget(kind: str) -> None:
    """Let the next use of a driver read the environment again."""
    import fsspec

    fsspec.get_filesystem_class(kind).clear_instance_cache()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "step_10"
    (folder / "state").mkdir(parents=True)
    # The server that stands in for Google's loses a carriage return at the end of a file.
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(300_000) + b"end")
    (folder / "state" / "trainer.pt").write_bytes(random.Random(1).randbytes(1000) + b"end")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["amazon", "google"])
def test_a_bucket_that_is_mistyped_is_refused_and_not_made(kind: str, folder: Path, request) -> None:
    request.getfixturevalue(kind)
    url = f"{ {'amazon': 's3', 'google': 'gs'}[kind] }://{BUCKET}-mistyped/fairy2/tiny"
    with pytest.raises(UserError, match=r"://.../fairy2/tiny: nothing there"):
        storage.check_writable(url)
    with pytest.raises(UserError, match=r"://.../fairy2/tiny/step_10: nothing there"):
        storage.push(folder, f"{url}/step_10")


def test_a_bucket_that_can_only_be_read_is_refused_in_one_line(amazon: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "how", "closed")
    with pytest.raises(UserError, match=r"^s3://\.\.\./fairy2/tiny: .*(Access Denied|Forbidden).*are you logged in\?$"):
        storage.check_writable(f"s3://{BUCKET}/fairy2/tiny")


def test_a_bucket_that_does_not_answer_is_refused_before_the_driver_gives_up(
    amazon: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amazon, "how", "stall")
    monkeypatch.setattr(storage, "PATIENCE", 1)
    with pytest.raises(UserError, match=r"^s3://\.\.\./fairy2/tiny: no answer; is the service reachable"):
        storage.check_writable(f"s3://{BUCKET}/fairy2/tiny")


@pytest.mark.parametrize("kind", ["amazon", "google"])
def test_a_folder_comes_back_from_a_real_store(kind: str, folder: Path, tmp_path: Path, request) -> None:
    request.getfixturevalue(kind)
    root = f"{ {'amazon': 's3', 'google': 'gs'}[kind] }://{BUCKET}/fairy2/tiny"
    storage.check_writable(root)
    assert storage.names(root) == []
    storage.push(folder, f"{root}/step_10")
    assert storage.names(root) == ["step_10"]
    assert contents(storage.fetch(f"{root}/step_10", tmp_path / "cache")) == contents(folder)
    storage.remove(f"{root}/step_10")
    assert storage.names(root) == []
    with pytest.raises(UserError, match="nothing there"):
        storage.fetch(f"{root}/step_10", tmp_path / "cache")


def test_what_arrives_changed_is_noticed(amazon: Proxy, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service says which MD5 it has; a driver that sends something else is found out at once."""
    import s3fs

    put = s3fs.S3FileSystem._put_file

    async def damage(self: object, local: str, remote: str, **more: object) -> None:
        changed = Path(local).with_name("changed")
        changed.write_bytes(bytes(reversed(Path(local).read_bytes())))
        await put(self, str(changed), remote, **more)

    monkeypatch.setattr(s3fs.S3FileSystem, "_put_file", damage)
    _forget("s3")
    with pytest.raises(UserError, match="has arrived changed"):
        storage.push(folder / "model.safetensors", f"s3://{BUCKET}/damaged")
    _forget("s3")


@pytest.mark.slow  # the driver tries again for half a minute
@pytest.mark.parametrize("how", ["500", "gone", "cut"])
def test_a_store_that_fails_is_one_line_and_leaves_nothing(
    amazon: Proxy, how: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(s3fs.core, "S3_RETRYABLE_ERRORS", ())
    storage.push(folder, f"s3://{BUCKET}/{how}")
    amazon.how = how
    try:
        with pytest.raises(UserError) as caught:
            storage.fetch(f"s3://{BUCKET}/{how}", tmp_path / "cache")
        assert "\n" not in str(caught.value)
    finally:
        amazon.how = ""
    assert not contents(tmp_path / "cache")
    assert contents(storage.fetch(f"s3://{BUCKET}/{how}", tmp_path / "cache")) == contents(folder)


@pytest.mark.slow
def test_a_run_whose_store_fails_and_comes_back_ends_with_everything_there(
    amazon: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each failure lasts for a step; the training goes on, and what is there at the end is what is here."""
    import s3fs

    monkeypatch.setattr(s3fs.core, "S3_RETRYABLE_ERRORS", ())
    monkeypatch.setattr(uploads, "FIRST_WAIT", 0.05)
    monkeypatch.setattr(uploads, "LONGEST_WAIT", 0.2)
    toy_files(tmp_path)
    failures = ["500", "gone", "cut", "stall", ""]

    def on_step(model: object, step: int) -> None:
        amazon.how = failures[min(step, 4)]

    url = f"s3://{BUCKET}/flaky"
    settings = ["training.save_interval=1", f"training.upload_to={url}", "training.save_total_limit=2"]
    try:
        run(resolved(tmp_path, *settings), on_step=on_step)
    finally:
        amazon.how = ""
    names = storage.names(url)
    assert {"step_5", "step_6", "training_log.csv"} <= set(names)
    for name in ("step_5", "step_6"):
        fetched = storage.fetch(f"{url}/{name}", tmp_path / "cache")
        assert contents(fetched) == contents(tmp_path / "run" / "checkpoints" / name)
