"""05's panels in Chromium: on the page by keyboard alone and by mouse, and in JupyterLab."""

import contextlib
import io
import re
import time
from pathlib import Path

import pandas as pd
import pytest

from qlora_helpers import HeadlineClassifier, classify_file

SECONDS = 300  # longer than a busy machine takes
HEADLINE = "Keeper saves two penalties as hosts reach the final"
TEXT, ANSWER = "textarea[placeholder^='Type a headline']", ".widget-html-content"
LINES = "textarea[placeholder^='or paste']"


class Page:
    """A page with the panels, as a reader has it: what can be seen, typed and clicked."""

    def __init__(self, browser):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.common.keys import Keys

        self.browser, self.keys, self.stale = browser, Keys, StaleElementReferenceException

    def open(self, address: str, present: str = TEXT) -> "Page":
        self.browser.get(address)
        self.until(lambda: self.all(present))
        return self

    def all(self, selector: str) -> list:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.until(lambda: [e for e in self.all(selector) if e.is_displayed()])[0]

    def until(self, condition):
        """Return what `condition()` returns, once that is true."""
        end = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(self.stale):  # drawn anew while it was read
                if value := condition():
                    return value
            assert time.monotonic() < end, self.all("body")[0].text[-2000:]
            time.sleep(0.1)

    def named(self, selector: str, *names: str):
        """Return the element of `selector` whose text is one of `names`."""
        return self.until(lambda: [e for e in self.all(selector) if e.text in names])[0]

    def said(self, pattern: str) -> str:
        """Return the text of the panels' answers, once it matches."""

        def match():
            return re.search(pattern, "\n".join(e.text for e in self.all(ANSWER)), re.S)

        return self.until(match).string

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def replace(self, text: str) -> None:
        """Select all that the focus holds, and type `text` over it."""
        from selenium.webdriver import ActionChains

        control = self.keys.CONTROL
        ActionChains(self.browser).key_down(control).send_keys("a").key_up(control).perform()
        self.press(text)

    def upload(self, path: Path) -> None:
        """Choose the file `path`. The button's input is not in the page, and the system's dialog
        cannot be driven: a click puts the input into the page instead."""
        self.browser.execute_script(
            "HTMLInputElement.prototype.click = "
            "function () { this.id = 'chosen'; document.body.append(this) }"
        )
        choose = "CSV or .txt"  # then with the number of files
        self.named("button", choose, f"{choose} (0)", f"{choose} (1)").click()
        self.until(lambda: self.all("#chosen"))[0].send_keys(str(path))
        self.named("button", f"{choose} (1)")

    def tab_to(self, description: str) -> None:
        """Press Tab until what has the focus says `description`: its text, its placeholder, or its
        label's text."""
        script = (
            "const e = document.activeElement; return e === document.body ? '' : "
            "e.placeholder || e.textContent || e.parentElement.textContent"
        )
        for _ in range(40):
            if description in self.browser.execute_script(script):
                return
            self.press(self.keys.TAB)
        raise AssertionError(f"Tab never reached {description!r}")

    def fill(self, selector: str, text: str) -> None:
        """Put `text` into a text area as a paste does: at once, with one event."""
        script = (
            "arguments[0].value = arguments[1];"
            "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
        )
        self.browser.execute_script(script, self.one(selector), text)

    def download(self, name: str) -> bytes:
        path = self.browser.downloads / name
        path.unlink(missing_ok=True)
        self.named("a[download]", f"Download {name}").click()

        def complete() -> bool:
            # Chromium first puts an empty file there, beside the one that it writes.
            unfinished = [*path.parent.glob("*.crdownload")]
            return path.exists() and path.stat().st_size and not unfinished

        self.until(complete)
        return path.read_bytes()


@pytest.fixture(scope="module")
def page(browser, page_address) -> Page:
    """One page for all tests: each that is opened starts a kernel and loads a model."""
    return Page(browser).open(page_address)


@pytest.fixture(scope="module")
def expected(run_folder) -> HeadlineClassifier:
    return HeadlineClassifier.from_workspace(run_folder)


def bars(row: pd.Series) -> str:
    """Return a pattern of the bars of an answer: a line for each label, with its probability."""
    shares = {name[2:-1]: f"{row[name]:.1%}" for name in row.index if name.startswith("P(")}
    return r"\s+".join(
        re.escape(f"{label} {p}").replace(r"\ ", r"\s+") for label, p in shares.items()
    )


def picture(request, element, name: str) -> None:
    if folder := request.config.getoption("--pictures"):
        (folder / name).write_bytes(element.screenshot_as_png)


def test_with_the_keyboard_alone(page, expected, request):
    # First all that is expected: two busy processes would show in the seconds on the page.
    example = "Striker signs record contract"
    tuned, of_example = expected([HEADLINE, example]).iloc
    base = expected.table(expected.probabilities([HEADLINE], base_model=True)).iloc[0]
    effects = expected.word_effects(HEADLINE)
    shown = [
        f"{word} {effect:+.1f}" for word, effect in zip(effects.word, effects.effect, strict=True)
    ]

    page.said("Striker|Chip maker")  # it starts with an example that is classified
    page.tab_to("Type a headline")
    page.replace(HEADLINE)
    page.press(page.keys.ENTER)
    page.said(rf"{re.escape(tuned.label)} in \d+\.\d\d s: {re.escape(HEADLINE)}\s+{bars(tuned)}")
    page.tab_to("beside the base model")
    page.press(page.keys.SPACE)
    page.said(rf"tuned model\s+{bars(tuned)}\s+base model\s+{bars(base)}")
    page.tab_to("which words mattered")
    page.press(page.keys.SPACE)
    page.said("Which words spoke for .*" + r"\s+".join(map(re.escape, shown)))
    picture(request, page.one("main, body"), "panel.png")
    page.tab_to(example)
    page.press(page.keys.ENTER)
    history = rf"{re.escape(of_example.label)} \d+% {example}\s.*{re.escape(HEADLINE)}"
    page.said("Asked so far.*" + history)
    for box in page.all("input[type=checkbox]"):  # as it was, for the tests that follow
        box.click()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("   \n\t", "Type a headline first"),
        (
            "<script>document.title = 'taken'</script><img src=x "
            "onerror=\"document.title='taken'\"> wins & <b>loses</b>",
            r"wins & <b>loses</b>",  # a reader's own text stays as it is
        ),
        ("&lt;script&gt;document.title = 'taken'&lt;/script&gt; 1 < 2", r"1 < 2"),
        ("Stocks " * 7200, r"\.\.\. \(50,399 characters\)"),
    ],
)
def test_hostile_text_gets_a_label_or_a_message(page, text, shown):
    title = page.browser.title
    page.fill(TEXT, text)
    page.named("button", "Classify").click()
    said = page.said(shown)
    assert "Type a headline first" in said or re.search(r"\d+\.\d%", said)
    assert "Traceback" not in page.one("body").text and page.browser.title == title != "taken"


def compare(data: bytes, expected: pd.DataFrame) -> None:
    """Compare a file that came down with the package's own answer: text exactly, numbers nearly."""
    own, numbers = expected.columns[:-6], expected.columns[-5:]
    types, empty = dict.fromkeys(own, str), {name: [""] for name in numbers}
    table = pd.read_csv(io.BytesIO(data), dtype=types, keep_default_na=False, na_values=empty)
    assert table.columns.tolist() == expected.columns.tolist()
    assert table.iloc[:, :-5].values.tolist() == expected.iloc[:, :-5].values.tolist()
    pd.testing.assert_frame_equal(table[numbers], expected[numbers], check_exact=False, atol=1e-4)


def check_file(page, expected, rows: pd.DataFrame, path: Path, said: str) -> bytes:
    """Upload `rows` as the file `path`, and return what comes down, once it is compared."""
    rows.to_csv(path, index=False)
    page.upload(path)
    page.named("button", "Classify all").click()
    page.said(said)
    data = page.download(f"{path.stem}_labels.csv")
    compare(data, classify_file(expected, path.read_bytes(), path.name))
    return data


def test_a_file_of_7600_rows_and_megabytes_can_be_downloaded(page, expected, tmp_path):
    """Most rows have no text, so that nobody waits for the model; their notes make it large."""
    texts = [HEADLINE if i % 400 == 0 else "" for i in range(7600)]
    notes = [f"{i}, <b> \\a " + "word " * 80 for i in range(7600)]
    rows = pd.DataFrame({"text": texts, "note": notes})
    said = "7,600 rows in .*7,581 without a text"
    assert len(check_file(page, expected, rows, tmp_path / "many.csv", said)) > 3_000_000


def test_a_page_without_a_run_says_what_to_do(browser, empty_page_address):
    page = Page(browser).open(empty_page_address, "h2")
    # The page that is shown until then has an h2 as well.
    page.until(lambda: "Not ready" in page.one("body").text)
    said = page.one("body").text
    assert "holds nothing from 01_setup yet. Run notebooks/01_setup.ipynb first." in said
    assert "Traceback" not in said


def test_notebook_5_in_jupyterlab(browser, lab_address, expected, request):
    page = Page(browser)
    browser.get(f"{lab_address}/lab/tree/05_inference.ipynb")
    # Before the kernel is there, a click may run nothing.
    page.until(lambda: "| Idle" in page.one("body").text)
    page.named(".lm-MenuBar-itemLabel", "Run").click()
    page.named(".lm-Menu-itemLabel", "Run All", "Run All Cells").click()
    page.one(TEXT)
    page.said("Chip maker")
    page.until(lambda: "Was it a T4?" in page.one(".jp-Notebook").text)  # the last cell
    area = page.one(TEXT)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    area.click()
    page.replace(HEADLINE)
    page.named("button", "Classify").click()
    page.said(bars(expected([HEADLINE]).iloc[0]))
    page.all("input[type=checkbox]")[1].click()
    page.said("Which words spoke for")
    picture(request, page.one(".jp-NotebookPanel-notebook"), "notebook5.png")
    lines = f"{HEADLINE}\n\nOil falls\n"
    page.fill(LINES, lines)
    page.named("button", "Classify all").click()
    page.said("3 rows in .*1 without a text")
    compare(page.download("lines_labels.csv"), classify_file(expected, lines.encode()))
