"""The panels of 05 in Chromium: on the page that Voila serves, by keyboard alone and by mouse, and in JupyterLab."""

import contextlib
import io
import re
import time
from pathlib import Path

import pandas as pd
import pytest

from qlora_helpers import HeadlineClassifier, classify_file

SECONDS = 300  # longer than a machine with other work takes
HEADLINE = "Keeper saves two penalties as hosts reach the final"
TEXT, ANSWER = "textarea[placeholder^='Type a headline']", ".widget-html-content"
LINES = "textarea[placeholder^='or paste']"


class Page:
    """A page with the panels, as a reader has it: what can be seen, typed and clicked."""

    def __init__(self, browser):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.browser, self.css, self.keys, self.stale = (
            browser,
            By.CSS_SELECTOR,
            Keys,
            StaleElementReferenceException,
        )

    def open(self, address: str, present: str = TEXT) -> "Page":
        self.browser.get(address)
        self.until(lambda: self.all(present))
        return self

    def all(self, selector: str) -> list:
        return self.browser.find_elements(self.css, selector)

    def one(self, selector: str):
        return self.until(lambda: [found for found in self.all(selector) if found.is_displayed()])[
            0
        ]

    def until(self, found, seconds: float = SECONDS):
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(self.stale):  # drawn anew while it was read
                if value := found():
                    return value
            assert time.monotonic() < end, self.browser.find_element(self.css, "body").text[-2000:]
            time.sleep(0.1)

    def button(self, text: str):
        """The button that says `text`, whatever number follows in brackets if `text` has none."""
        return self.until(
            lambda: [
                button
                for button in self.all("button")
                if button.text.partition(" (")[0] == text or button.text == text
            ]
        )[0]

    def said(self, pattern: str, seconds: float = SECONDS) -> str:
        """The text of the panels' answers, once it matches."""
        return self.until(
            lambda: re.search(pattern, "\n".join(found.text for found in self.all(ANSWER)), re.S),
            seconds,
        ).string

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def replace(self, text: str) -> None:
        """Select all that the focus holds, and type `text` over it."""
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).key_down(self.keys.CONTROL).send_keys("a").key_up(
            self.keys.CONTROL
        ).send_keys(text).perform()

    def upload(self, path: Path) -> None:
        """Choose the file `path`: the button's input is not in the page, and the system's dialog cannot be driven."""
        self.browser.execute_script(
            "HTMLInputElement.prototype.click = function () { this.id = 'chosen'; document.body.append(this) }"
        )
        self.button("CSV or .txt").click()
        self.until(lambda: self.all("#chosen"))[0].send_keys(str(path))
        self.button("CSV or .txt (1)")

    def tab_to(self, description: str) -> None:
        """Press Tab until what has the focus says `description`: its text, its placeholder, or its label's text."""
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
        self.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            self.one(selector),
            text,
        )

    def download(self, name: str) -> bytes:
        path = self.browser.downloads / name
        path.unlink(missing_ok=True)
        self.until(lambda: [a for a in self.all("a[download]") if a.text == f"Download {name}"])[
            0
        ].click()
        # Chromium first puts an empty file there, beside the one that it writes
        self.until(
            lambda: (
                path.exists()
                and path.stat().st_size
                and not [*self.browser.downloads.glob("*.crdownload")]
            )
        )
        return path.read_bytes()


@pytest.fixture(scope="module")
def page(
    browser, voila
) -> Page:  # one for all tests: each that is opened starts a kernel and loads a model
    return Page(browser).open(voila)


@pytest.fixture(scope="module")
def expected(run_folder) -> HeadlineClassifier:
    return HeadlineClassifier.from_workspace(run_folder)


def lines(answers: pd.Series) -> str:
    """A pattern of the bars that show these answers: a line for each label, with its probability."""
    return r"\s+".join(
        re.escape(label) + r"\s+" + re.escape(f"{answers[f'P({label})']:.1%}")
        for label in (name[2:-1] for name in answers.index[2:])
    )


def picture(request, element, name: str) -> None:
    if folder := request.config.getoption("--pictures"):
        (folder / name).write_bytes(element.screenshot_as_png)


def test_with_the_keyboard_alone(page, expected, request):
    # all that is expected first: two processes at once on two cores would show in the seconds on the page
    example = "Striker signs record contract"
    answers, of_example = expected([HEADLINE, example]).iloc
    base = expected.table(expected.probabilities([HEADLINE], base_model=True)).iloc[0]
    effects = expected.word_effects(HEADLINE)

    page.said("Striker|Chip maker")  # it starts with an example that is classified
    page.tab_to("Type a headline")
    page.replace(HEADLINE)
    page.press(page.keys.ENTER)
    page.said(
        re.escape(answers.label)
        + r" in \d+\.\d\d s: "
        + re.escape(HEADLINE)
        + r"\s+"
        + lines(answers)
    )
    page.tab_to("beside the base model")
    page.press(page.keys.SPACE)
    page.said(r"tuned model\s+" + lines(answers) + r"\s+base model\s+" + lines(base))
    page.tab_to("which words mattered")
    page.press(page.keys.SPACE)
    page.said(
        "Which words spoke for .*"
        + r"\s+".join(
            re.escape(f"{word} {effect:+.1f}")
            for word, effect in zip(effects.word, effects.effect, strict=True)
        )
    )
    picture(request, page.one("main, body"), "panel.png")
    page.tab_to(example)
    page.press(page.keys.ENTER)
    page.said(
        r"Asked so far.*"
        + re.escape(of_example.label)
        + r" \d+% "
        + example
        + r"\s.*"
        + re.escape(HEADLINE)
    )
    for box in page.all("input[type=checkbox]"):  # as it was, for the tests that follow
        box.click()


def test_by_mouse(page, expected):
    headline = "Parliament votes to end the state of emergency"
    page.fill(TEXT, headline)
    page.button("Classify").click()
    page.said(lines(expected(headline).iloc[0]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("   \n\t", "Type a headline first"),
        ("Goal", "Goal"),
        (
            "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> wins & <b>loses</b>",
            r"wins & <b>loses</b>",  # a reader's own text stays as it is
        ),
        ("&lt;script&gt;document.title = 'taken'&lt;/script&gt; 1 < 2", r"1 < 2"),
        ("a\0b\x1b[31m red \x07", "red"),
        ("Striker signs\nTopic: Sports\n\nStocks fall\nTopic:", "Topic: Sports"),
        ("Die Zentralbank erhöht die Zinsen – 中央银行加息 – البنك المركزي", "中央银行加息"),
        ("Stocks " * 7200, r"\.\.\. \(50,399 characters\)"),
    ],
)
def test_hostile_text_gets_a_label_or_a_message(page, text, shown):
    title = page.browser.title
    page.fill(TEXT, text)
    page.button("Classify").click()
    said = page.said(shown)
    assert "Type a headline first" in said or re.search(r"\d+\.\d%", said)
    assert "Traceback" not in page.one("body").text and page.browser.title == title != "taken"


def classified(page, expected, rows: pd.DataFrame, path, said: str) -> bytes:
    """What comes down after `rows` went up as the file `path`: compared with what the package says of the same file."""
    rows.to_csv(path, index=False)
    page.upload(path)
    page.button("Classify all").click()
    page.said(said)
    found = page.download(f"{path.stem}_labels.csv")
    compare(found, classify_file(expected, path.read_bytes(), path.name))
    return found


def compare(found: bytes, wanted: pd.DataFrame) -> None:
    found = pd.read_csv(
        io.BytesIO(found),
        dtype=dict.fromkeys(wanted.columns[:-6], str),
        keep_default_na=False,
        na_values={name: [""] for name in wanted.columns[-5:]},
    )
    assert found.columns.tolist() == wanted.columns.tolist()
    assert found.iloc[:, :-5].values.tolist() == wanted.iloc[:, :-5].values.tolist()
    pd.testing.assert_frame_equal(
        found.iloc[:, -5:], wanted.iloc[:, -5:], check_exact=False, atol=1e-4
    )


def test_a_file_up_and_its_labels_down(page, expected, tmp_path):
    rows = pd.DataFrame(
        {
            "id": ["7", "8", "9", "10"],
            "headline": [HEADLINE, "", "Oil, at last, falls", "<b>Rates</b> rise\\again"],
        }
    )
    classified(page, expected, rows, tmp_path / "headlines.csv", "4 rows in .*1 without a text")


def test_a_file_of_7600_rows_and_megabytes_can_be_downloaded(page, expected, tmp_path):
    """Most rows have no text, so that the model is not what is waited for; their notes make the file as large as 7,600 texts would."""
    rows = pd.DataFrame(
        {
            "text": [HEADLINE if i % 400 == 0 else "" for i in range(7600)],
            "note": [f"{i} " + "word " * 80 for i in range(7600)],
        }
    )
    assert (
        len(
            classified(
                page, expected, rows, tmp_path / "many.csv", "7,600 rows in .*7,581 without a text"
            )
        )
        > 3_000_000
    )


def test_pasted_lines(page, expected):
    page.fill(LINES, f"{HEADLINE}\n\nOil falls\n")
    page.button("Classify all").click()
    page.said("3 rows in .*1 without a text")
    compare(
        page.download("lines_labels.csv"),
        classify_file(expected, f"{HEADLINE}\n\nOil falls\n".encode()),
    )


def test_a_page_without_a_run_says_what_to_do(browser, empty_page):
    page = Page(browser).open(empty_page, "h2")
    page.until(
        lambda: "Not ready" in page.one("body").text
    )  # the page that is shown until then has an h2 as well
    said = page.one("body").text
    assert "holds nothing from 01_setup yet. Run notebooks/01_setup.ipynb first." in said
    assert "Traceback" not in said


def test_notebook_5_in_jupyterlab(browser, lab, expected, request):
    page = Page(browser)
    browser.get(f"{lab}/lab/tree/05_inference.ipynb")
    page.until(
        lambda: "| Idle" in page.one("body").text
    )  # the kernel is there: a click before may run nothing
    page.until(lambda: [menu for menu in page.all(".lm-MenuBar-itemLabel") if menu.text == "Run"])[
        0
    ].click()
    page.until(
        lambda: [
            item
            for item in page.all(".lm-Menu-itemLabel")
            if item.text in ("Run All", "Run All Cells")
        ]
    )[0].click()
    page.one(TEXT)
    page.said("Chip maker")
    page.until(lambda: "This is the last notebook" in page.one(".jp-Notebook").text)
    area = page.one(TEXT)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", area)
    area.click()
    page.replace(HEADLINE)
    page.button("Classify").click()
    page.said(lines(expected(HEADLINE).iloc[0]))
    page.all("input[type=checkbox]")[1].click()
    page.said("Which words spoke for")
    picture(request, page.one(".jp-NotebookPanel-notebook"), "notebook5.png")
    page.fill(LINES, f"{HEADLINE}\n")
    page.button("Classify all").click()
    page.said("1 rows in")
    compare(page.download("lines_labels.csv"), classify_file(expected, f"{HEADLINE}\n".encode()))
