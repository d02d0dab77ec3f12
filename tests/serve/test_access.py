"""Who may ask: types of bodies, hosts, origins, keys, and the page at `/`."""

import re
from typing import Any

import httpx
import pytest
from serving import Process, served

JSON = {"Content-Type": "application/json"}
BODY = b'{"model": "toy", "prompt": "a", "max_tokens": 1}'


def post(process: Process, **headers: str) -> httpx.Response:
    return httpx.post(f"{process.url}/v1/completions", content=BODY, headers=headers)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_a_body_must_be_said_to_be_json(process: Process, kind: str | None) -> None:
    answer = post(process, **({} if kind is None else {"Content-Type": kind}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert post(process, **{"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_on_loopback_host_must_name_this_machine(process: Process) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::1].evil.example", ""):
        answer = post(process, **JSON, Host=host)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")
        assert httpx.get(f"{process.url}/", headers={"Host": host}).status_code == 403
    for host in ("localhost", "LocalHost:1", "[::1]:8000", "127.0.0.1"):
        assert post(process, **JSON, Host=host).status_code == 200


def test_without_cors_no_origin_is_let_in(process: Process) -> None:
    asked = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    answer = httpx.options(f"{process.url}/v1/completions", headers=asked)
    assert (answer.status_code, answer.headers["allow"]) == (204, "GET, POST, OPTIONS")
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_the_page_is_one_file_that_asks_this_server_alone(process: Process) -> None:
    answer = httpx.get(process.url)
    page = answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert not re.findall(r"""https?://|//[a-z]|@import|<link|<script [^>]*src|<img""", page)
    names = set(re.findall(r'id="([^"]+)"', page))
    assert set(re.findall(r'for="([^"]+)"', page)) <= names
    assert set(re.findall(r"""\bat\("([^"]+)"\)""", page)) <= names
    controls = re.findall(r"<(?:input|textarea|select)[^>]*id=\"([^\"]+)\"", page)
    assert set(controls) == set(re.findall(r'<label for="([^"]+)"', page))


def test_listed_origins_are_let_in_and_the_page_can_be_left_out(folder: Any) -> None:
    options = ["--cors", "https://a.example", "--no-ui", "--threads", "1", "--api-key", "secret"]
    with served(folder, *options) as process:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            answer = httpx.options(f"{process.url}/v1/completions", headers=asked | {"Origin": origin})
            assert answer.headers.get("access-control-allow-origin") == allowed
            key = {"Authorization": "Bearer secret"}
            answer = post(process, **JSON, **key, Origin=origin)
            assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (200, allowed)
        assert httpx.get(process.url).status_code == 404
