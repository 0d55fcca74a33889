"""A headless Chromium from the system's packages, and the vote page served by a process of its own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

QLORA = Path(sys.executable).parent / "qlora"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 780}
TIMEOUT_MS = 60_000  # the machine may be busy with other tests


@pytest.fixture(scope="module")  # its event loop runs as long as it lives, and other tests want none
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed; install the system's package chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Open an address in a context of its own. Errors of the page, and refusals by its own policy, fail the test."""
    contexts, faults = [], []

    def open_at(url: str, *, phone: bool = False, **options: object) -> Page:
        context = chromium.new_context(viewport=PHONE if phone else DESKTOP, has_touch=phone, **options)  # type: ignore[arg-type]
        context.set_default_timeout(TIMEOUT_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Content Security" in message.text else None)
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert faults == []


@dataclass
class VotePage:
    """`qlora vote serve` on one study; may be killed and started again on the same port."""

    study: Path
    pairs: Path
    options: list[str]
    port: int = 0
    said: dict = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        command = [
            QLORA,
            "vote",
            "serve",
            self.pairs,
            "--study",
            self.study,
            "--port",
            self.port,
            *self.options,
            "--json",
        ]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.said = json.loads(self.process.stdout.readline())
        self.port = int(self.said["url"].split(":")[2].split("/")[0])

    def kill(self) -> None:
        if self.process is not None and self.process.stdout is not None:
            self.process.kill()  # SIGKILL
            self.process.wait(30)
            self.process.stdout.close()
        self.process = None


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., VotePage]]:
    started = []

    def start(rows: list[dict], *options: str) -> VotePage:
        pairs = tmp_path / "pairs.jsonl"
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        started.append(VotePage(tmp_path / "votes.sqlite", pairs, list(options)))
        started[-1].start()
        return started[-1]

    yield start
    for page in started:
        page.kill()
