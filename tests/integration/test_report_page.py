"""The page in a real browser: nothing on the console, nothing asked of the network."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from sdcompress.report import write_report
from tests.sample_run import make_run, sample_results

REQUIRE = "SDCOMPRESS_REQUIRE_CHROMIUM"
HOSTILE = '"><script>console.error("ran")</script><img src=x onerror="console.error(1)">'
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1 and no Chromium is on the path")
        pytest.skip("Chromium is not installed")
    return found


def browse(chromium: str, page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """Load the page, let it settle; returns the document as it then is, and the console."""
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
        f"--user-data-dir={profile}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def test_the_console_shows_what_is_wrong(chromium: str, tmp_path: Path) -> None:
    """The next tests prove something only if errors would be seen."""
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('seen')</script>")
    assert "seen" in browse(chromium, page, tmp_path / "profile", "--dump-dom")[1]


@pytest.mark.parametrize("prompt", ["a red circle", HOSTILE], ids=["plain", "hostile"])
def test_the_page_loads_without_a_word_on_the_console(
    chromium: str, tmp_path: Path, prompt: str
) -> None:
    run = make_run(tmp_path / "run", sample_results(model=prompt), prompts=(prompt, "another"))
    document, console = browse(chromium, write_report(run), tmp_path / "profile", "--dump-dom")
    assert console == ""
    assert "Do it again" in document
    assert "<script" not in document
    assert document.count("<img") == 4


def test_an_unfinished_run_has_a_page_too(chromium: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    document, console = browse(chromium, write_report(run), tmp_path / "profile", "--dump-dom")
    assert console == ""
    assert "Nothing has been measured yet" in document


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_is_painted(chromium: str, tmp_path: Path, width: int) -> None:
    run = make_run(tmp_path / "run", sample_results())
    shot = tmp_path / "shot.png"
    options = (f"--screenshot={shot}", f"--window-size={width},2000")
    _, console = browse(chromium, write_report(run), tmp_path / "profile", *options)
    assert console == ""
    with Image.open(shot) as picture:
        assert picture.width == width
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    assert len(colours) > 100
