"""What `wf push` sends to a hub on this machine is what lies in the folder."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from wrinklefree.commands import push
from wrinklefree.core.errors import UserError

OID = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Takes repositories and commits as the hub does, and keeps the files of the commits in `received`."""

    received: dict[str, bytes]
    created: list[dict[str, object]]
    refuses = 0  # answer all requests with this status

    def do_POST(self) -> None:
        body = self._body()
        if self.refuses:
            return self._answer(self.refuses, {"error": "no"})
        if self.path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self._answer(200, {"url": f"{constants.ENDPOINT}/me/tiny"})
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            return self._answer(200, {"files": files})
        if self.path == "/api/validate-yaml":  # of the card
            return self._answer(200, {"errors": [], "warnings": []})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._answer(
            200, {"commitUrl": f"{constants.ENDPOINT}/me/tiny/commit/{OID}", "commitOid": OID, "success": True}
        )

    def do_GET(self) -> None:
        self._answer(self.refuses or 200, {"id": "me/tiny", "siblings": []})

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _answer(self, status: int, values: object) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"received": {}, "created": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_a_test")
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


def exported(path: Path) -> Path:
    folder = path / "run" / "packed"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\ntags: [wrinklefree]\n---\n# tiny\n", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_all_files_arrive(hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path)
    push.run("me/tiny", folder.parent, private=True)
    assert hub.received == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.created[0]["name"] == "tiny"
    assert "3 files" in capsys.readouterr().out


def test_a_dry_run_sends_nothing(hub: type[Hub], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    push.run("me/tiny", exported(tmp_path), dry_run=True)
    assert (hub.received, hub.created) == ({}, [])
    assert "model.safetensors" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "words"), [(401, "hf auth login"), (403, "hf auth login"), (404, "answered 404")])
def test_what_the_hub_refuses_is_one_line(hub: type[Hub], tmp_path: Path, status: int, words: str) -> None:
    hub.refuses = status
    with pytest.raises(UserError, match=words) as caught:
        push.run("me/tiny", exported(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_hub_that_is_not_there_is_one_line(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="does not answer"):
        push.run("me/tiny", exported(tmp_path))


def test_an_asset_for_core_ai_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = exported(tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.aimodel").mkdir()
    (folder / "model.aimodel" / "weights.bin").write_bytes(b"1")
    push.run("me/tiny", folder, dry_run=True)
    assert "model.aimodel/weights.bin" in capsys.readouterr().out


def test_only_an_exported_folder_goes(tmp_path: Path) -> None:
    folder = exported(tmp_path)
    with pytest.raises(UserError, match="not ORG/NAME"):
        push.run("tiny", folder)
    with pytest.raises(UserError, match="no such folder"):
        push.run("me/tiny", tmp_path / "nowhere")
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match="no card"):
        push.run("me/tiny", folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        push.run("me/tiny", folder)
