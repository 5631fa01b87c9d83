"""The report page as people see it: opened from disk in headless Chromium, wide and narrow, light and dark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lmim.__main__ import main
from tests.conftest import REPOSITORY, TINY
from tests.run_folders import rows_of, write_run
from tests.test_report import NASTY, nasty_run

pytestmark = pytest.mark.browser
PARTS = ["health", "curves", "tokens", "evaluations", "weights", "options"]
SWITCHES = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in (*SWITCHES, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run_folder(shards, tmp_path_factory):
    """A run of six steps with its evaluation: every part of the page has something to show."""
    folder = tmp_path_factory.mktemp("report") / "run"
    arguments = [*TINY, "parallel.backend=local", f"run.folder={folder}", f"data.train={shards}/train",
                 f"data.eval={shards}/eval", "optim.duration=6st", "eval.knn_every=3st"]  # fmt: skip
    assert main(["train", str(REPOSITORY / "configs" / "quickstart.yaml"), *arguments]) == 0
    assert main(["eval", "knn", str(folder)]) == 0
    assert main(["report", str(folder)]) == 0
    return folder


def open_page(browser, page: Path, width: int, scheme: str = "light", scripts: bool = True) -> None:
    """Open a page at a width in px, with an empty console and no requests on record."""
    metrics = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = dict(features=[dict(name="prefers-color-scheme", value=scheme)])
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", dict(value=not scripts))
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.resolve().as_uri())


def requests(browser) -> list[str]:
    """Return the addresses that were asked for since the page was opened, `data:` left out."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith("data:")]


def script(browser, code: str):
    return browser.execute_script(code)


def scrolls_sideways(browser, width: int) -> bool:
    """Tell whether the page is wider than the window of that width; a phone's window grows with what is in it."""
    seen = script(browser, "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]")
    return seen[0] > min(seen[1], width)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_part_is_there(browser, run_folder, width, scheme):
    page = run_folder / "report.html"
    open_page(browser, page, width, scheme)
    assert script(browser, "return innerWidth") == width
    assert not scrolls_sideways(browser, width)
    boxes = script(browser, "return [...document.querySelectorAll('section[id]')].map(s => {"
                   "const b = s.getBoundingClientRect(); return [s.id, b.left, b.right, b.height]})")  # fmt: skip
    assert [box[0] for box in boxes] == PARTS
    for name, left, right, height in boxes:
        assert left >= 0 and right <= width and height > 60, name
    drawings = script(browser, "return [...document.querySelectorAll('.plot > svg')].map(s => {"
                      "const b = s.getBoundingClientRect(); return [b.width, b.height, b.right]})")  # fmt: skip
    assert len(drawings) == 15
    for drawn_width, height, right in drawings:
        assert drawn_width > 280 and height > 150 and right <= width
    letters = script(browser, "return [...document.querySelectorAll('.plot text')].map("
                     "t => t.getBoundingClientRect().height)")  # fmt: skip
    assert min(letters) >= 9
    pictures = script(browser, "return [...document.images].map(i => [i.naturalWidth, i.complete, i.alt.length])")
    assert len(pictures) == 8 * 4 and all(w > 0 and complete and alt > 10 for w, complete, alt in pictures)
    ground = script(browser, "return getComputedStyle(document.body).backgroundColor")
    assert (int(ground.split("(")[1].split(",")[0]) < 60) == (scheme == "dark")
    assert browser.get_log("browser") == []
    assert requests(browser) == [page.resolve().as_uri()]


def test_what_is_wide_scrolls_in_its_own_box(browser, run_folder):
    open_page(browser, run_folder / "report.html", 390)
    script(browser, "document.querySelector('h1').style.minWidth = '500px'")
    assert scrolls_sideways(browser, 390), "the check is blind"
    open_page(browser, run_folder / "report.html", 390)
    assert not scrolls_sideways(browser, 390)
    boxes = script(browser, "return [...document.querySelectorAll('.wide')].filter(b => b.clientWidth).map("
                   "b => [b.scrollWidth > b.clientWidth, getComputedStyle(b).overflowX])")  # fmt: skip
    assert any(scrolls for scrolls, _ in boxes) and {overflow for _, overflow in boxes} == {"auto"}


def test_without_scripts_it_is_complete(browser, run_folder):
    from selenium.webdriver.common.by import By

    open_page(browser, run_folder / "report.html", 1280, scripts=False)
    try:
        texts = {part: browser.find_element(By.ID, part).text for part in PARTS}
        assert all(len(text) > 60 for text in texts.values())
        assert "Is the run healthy?" in texts["health"] and "lmim.load_encoder" in texts["weights"]
        assert len(browser.find_elements(By.CSS_SELECTOR, ".plot > svg .curve")) >= 12
        assert not browser.find_elements(By.CSS_SELECTOR, ".tip")
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", dict(value=False))


def test_values_under_the_pointer(browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    write_run(tmp_path, rows_of(81, loss=[step / 10 for step in range(81)]))
    assert main(["report", str(tmp_path)]) == 0
    for width in (1280, 390):
        open_page(browser, tmp_path / "report.html", width)
        plot = browser.find_element(By.CSS_SELECTOR, "#chart-loss .plot")
        script(browser, "document.querySelector('#chart-loss').scrollIntoView({behavior: 'instant'})")
        tip = plot.find_element(By.CLASS_NAME, "tip")
        assert not tip.is_displayed()
        at = (50 + 390) / 2 / 400 - 0.5  # the middle of the axes: epoch 4.05, step 40
        ActionChains(browser, duration=0).move_to_element_with_offset(plot, round(at * plot.size["width"]), 0).perform()
        assert tip.is_displayed()
        epoch, value = tip.text.splitlines()
        assert abs(float(epoch.removeprefix("epoch ")) - 4.05) < 0.05
        assert abs(float(value.removeprefix("loss ")) - 3.95) <= 0.1
        box = script(browser, "const b = document.querySelector('#chart-loss .tip').getBoundingClientRect();"
                     "return [b.left, b.right]")  # fmt: skip
        assert box[0] >= 0 and box[1] <= width
    assert browser.get_log("browser") == []


def test_nothing_that_a_file_holds_runs(browser, tmp_path):
    folder = nasty_run(tmp_path)
    assert main(["report", str(folder)]) == 0
    for width in (1280, 390):
        open_page(browser, folder / "report.html", width)  # an alert would make the next line fail
        assert browser.title == f"{NASTY} · Latent MIM"
        assert script(browser, "return document.querySelector('h1').textContent") == NASTY
        assert not scrolls_sideways(browser, width)
        assert browser.get_log("browser") == []
        assert requests(browser) == [(folder / "report.html").resolve().as_uri()]


def test_the_policy_lets_no_other_script_run(browser, run_folder, tmp_path):
    """Were a file's text to become markup after all, the browser would still not run it."""
    text = (run_folder / "report.html").read_text()
    forged = tmp_path / "forged.html"
    forged.write_text(text.replace("<h1>", "<script>document.title='run'</script><img src=x onerror='document.title=1'>"
                                   "<img src='http://127.0.0.1:9/x.png'><h1>"))  # fmt: skip
    open_page(browser, forged, 1280)
    assert browser.title == "run · Latent MIM"  # the run's name, not what the script would set
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))


def test_several_runs(browser, run_folder, tmp_path):
    other = write_run(tmp_path / "other", rows_of(30), [0.3, 0.4])
    assert main(["report", str(run_folder), str(other)]) == 0
    for width in (1280, 390):
        open_page(browser, run_folder / "comparison.html", width)
        assert not scrolls_sideways(browser, width)
        assert len(script(browser, "return [...document.querySelectorAll('#chart-loss .curve.c1')]")) == 2  # and legend
        assert browser.get_log("browser") == []


def test_a_run_that_has_hardly_begun(browser, tmp_path):
    write_run(tmp_path, [])
    assert main(["report", str(tmp_path)]) == 0
    for width in (1280, 390):
        open_page(browser, tmp_path / "report.html", width)
        assert script(browser, "return [...document.querySelectorAll('section[id]')].map(s => s.id)") == PARTS
        assert not scrolls_sideways(browser, width)
        assert browser.get_log("browser") == []
