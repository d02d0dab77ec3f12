"""The chat page at `/` in a real browser, if Chromium is there."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, page
from serving import Process, until

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
ANSWERS = "[...document.querySelectorAll('.assistant span')].map((span) => span.textContent)"
IDLE = "document.querySelector('#stop').disabled"


@pytest.fixture(scope="module")
def tab(process: Process, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with page(tmp_path_factory.mktemp("chromium")) as made:
        made.go(process.url)
        yield made


def test_an_answer_comes_piece_by_piece_and_stays_after_a_reload(tab: Page, process: Process, tmp_path: Path) -> None:
    assert tab.run("document.title") == "toy"
    assert tab.run("document.querySelector('#engine').textContent").startswith("engine: ")
    assert tab.run("document.activeElement.id") == "text"
    tab.write("Say it.")
    tab.press("Enter", "\r")
    tab.until(f"{ANSWERS}.length === 1 && {IDLE}")
    (answer,) = tab.run(ANSWERS)
    assert answer
    assert tab.run("document.querySelector('#speed').textContent").endswith(" tokens/s")
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 5000
    tab.go(process.url)
    assert tab.run(ANSWERS) == [answer]
    assert not [url for url in tab.asked() if not url.startswith(process.url)]


def test_escape_stops_an_answer_and_frees_its_slot(tab: Page, process: Process) -> None:
    tab.run("document.querySelector('#clear').click()")
    assert tab.run(ANSWERS) == []
    tab.write("Say it.")
    tab.press("Enter", "\r")
    tab.until(f"!{IDLE}")
    tab.press("Escape")
    tab.until(IDLE)
    until(process.is_idle)
    assert tab.run("document.querySelectorAll('.error').length") == 0


def test_a_refusal_is_shown_and_the_message_can_be_sent_again(tab: Page) -> None:
    tab.run("document.querySelector('#clear').click()")
    tab.run("document.querySelector('#text').value = ''")
    tab.run("document.querySelector('#temperature').value = '-1'")
    tab.write("again")
    tab.press("Enter", "\r")
    tab.until("document.querySelectorAll('.error').length === 1")
    assert "temperature" in tab.run("document.querySelector('.error').textContent")
    assert tab.run("document.querySelector('#text').value") == "again"
    tab.run("document.querySelector('#temperature').value = '0.7'")


def test_keyboard_and_screen_reader(tab: Page) -> None:
    tab.run("document.querySelector('#text').focus()")
    order = []
    for _ in range(8):
        tab.press("Tab")
        order.append(tab.run("document.activeElement.id || document.activeElement.tagName"))
    assert order.index("send") < order.index("SUMMARY")
    tab.run("document.querySelector('details').open = true")
    named = tab.named()
    for role, name in (
        ("log", "Conversation"),
        ("textbox", "Message (Enter sends, Shift+Enter begins a line, Escape stops the answer)"),
        ("button", "Send"),
        ("button", "Stop"),
        ("combobox", "Model"),
        ("spinbutton", "Temperature"),
    ):
        assert (role, name) in named, sorted(named)
