"""The page in a real browser: it loads without a network, says nothing on the console, and can be read aloud."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import builders
import pytest

from moe_kernels.telemetry.load import RouterHistory
from moe_kernels.tools.compare.comparison import Analysis
from moe_kernels.tools.compare.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    comparison = builders.comparison()
    steps = [*range(1, 41)]
    tokens = [[[8 + step, 8, 0, 8], [8, 8, 8, 8]] for step in steps]
    rows = [[sum(layer) + 2 for layer in layers] for layers in tokens]
    comparison.runs[1].router = RouterHistory(["layers.0", "layers.1"], [4, 4], steps, tokens, rows)
    return write_report([Analysis(comparison)], tmp_path_factory.mktemp("page"))


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    # A proxy that is not there: whatever the page asked of the network would fail, and be logged.
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--proxy-server=127.0.0.1:9"]
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [BROWSER, *fixed, profile, "--virtual-time-budget=2000", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_loads_alone_and_in_silence(page: Path, width: int) -> None:
    done = browse(page, "--dump-dom", f"--window-size={width},2000")
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<figure") == page.read_text().count("<figure")
    assert "Load of every expert over time" in done.stdout


@needs_browser
def test_the_console_would_be_heard(page: Path) -> None:
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text().replace("</body>", "<script>nonesuch()</script></body>"))
    assert "CONSOLE" in browse(broken, "--dump-dom").stderr


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_is_wider_than_the_screen(page: Path, width: int) -> None:
    probe = page.with_name(f"probe-{width}.html")
    script = "document.title = document.documentElement.scrollWidth + '/' + innerWidth"
    probe.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    title = re.search(r"<title>(\d+)/(\d+)</title>", browse(probe, "--dump-dom", f"--window-size={width},900").stdout)
    assert title is not None
    assert int(title.group(1)) <= int(title.group(2))


class Reader(html.parser.HTMLParser):
    """What a screen reader needs: names of images, headers of tables, order of headings."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.levels = [0]
        self.references: list[str] = []
        self.language = ""
        self.header: str | None = None

    def handle_data(self, data: str) -> None:
        if self.header is not None:
            self.header += data.strip()

    def handle_endtag(self, tag: str) -> None:
        if tag == "th":
            if not self.header:
                self.problems.append("a table header without words")
            self.header = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.references += [value for name in ("src", "href", "xlink:href") if (value := found.get(name))]
        if tag == "html":
            self.language = found.get("lang") or ""
        if found.get("role") == "img" and len(found.get("aria-label") or "") < 20:
            self.problems.append(f"an image without words: {found}")
        if tag == "th" and found.get("scope") not in ("col", "row"):
            self.problems.append(f"a table header without scope: {found}")
        if tag == "th":
            self.header = ""
        if tag == "svg" and found.get("aria-hidden") != "true":
            self.problems.append("a plot that is read out letter by letter")
        if re.fullmatch(r"h[1-6]", tag):
            if int(tag[1]) > self.levels[-1] + 1:
                self.problems.append(f"{tag} after h{self.levels[-1]}")
            self.levels.append(int(tag[1]))


def test_can_be_read_aloud_and_stands_alone(page: Path) -> None:
    reader = Reader()
    reader.feed(page.read_text())
    assert reader.problems == []
    assert reader.language == "en"
    assert reader.levels.count(1) == 1
    outside = [value for value in reader.references if not value.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert "@import" not in page.read_text()


def test_the_heat_map_says_in_words_what_it_shows(page: Path) -> None:
    text = page.read_text()
    assert "Heat map of the load of 8 experts in 2 layers from step 1 to 40" in text
    assert "Experts unused at the end: 1; the busiest has 3.00 times the mean." in text
    assert '<th scope="row">layers.0</th>' in text


def luminance(color: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as the accessibility guidelines (WCAG 2) define it."""
    digits = color.lstrip("#")
    digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_word_stands_out_from_its_ground(page: Path, mode: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", page.read_text(), re.DOTALL)
    colors = dict(re.findall(r"--([\w-]+): (#\w+);", light if mode == "light" else dark))
    pairs = [(word, ground) for word in ("ink", "soft") for ground in ("bg", "card")]
    pairs += [("soft", "dim-bg"), ("good", "good-bg"), ("bad", "bad-bg"), ("warn", "warn-bg")]
    for word, ground in pairs:
        lighter, darker = sorted((luminance(colors[word]), luminance(colors[ground])), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, f"{mode}: --{word} on --{ground}"


@needs_browser
@pytest.mark.parametrize(("setting", "ground"), [(1, "rgb(255, 255, 255)"), (0, "rgb(18, 22, 28)")])
def test_dark_where_the_reader_wants_it_dark(page: Path, setting: int, ground: str) -> None:
    probe = page.with_name(f"mode-{setting}.html")
    script = "document.title = getComputedStyle(document.body).backgroundColor"
    probe.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    assert (
        f"<title>{ground}</title>"
        in browse(probe, "--dump-dom", f"--blink-settings=preferredColorScheme={setting}").stdout
    )
