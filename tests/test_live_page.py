"""The live page in a headless Chromium, behind its real server: a log that grows while it is open,
its curves with keyboard and pointer, its looks.
"""
import re
import time
from types import SimpleNamespace

import pytest

from conftest import ROOT
from live_runs import MadeRun, opening, samples, serve, steps, validation
from nanochat.folders import lock_folder
from page_fakes import (
    CHROMIUM,
    DESKTOP,
    PHONE,
    SMALL_PHONE,
    launch_chromium,
    low_contrasts,
    open_page,
)

ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
PAGE = (ROOT / "nanochat" / "live.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    with launch_chromium() as browser:
        yield browser


@pytest.fixture
def run(base_dir):
    run = MadeRun(base_dir).write(opening(), *steps(1, 10), validation(10, 2.5), *steps(11, 20))
    with lock_folder(run.folder, 0):
        yield run


@pytest.fixture
def server(base_dir):
    with serve() as address:
        yield SimpleNamespace(address=address)


@pytest.fixture
def page(browser, run, server):
    page = open_page(browser, server)
    page.get_by_text("is training").wait_for()
    yield page
    page.context.close()


def tile(page, label):
    """The value of a tile."""
    return page.locator(f"#tiles div:has(dt:text-is('{label}')) dd")


def plot(page, name):
    return page.get_by_role("slider", name=re.compile(f"^{name} by step"))


def wait_for(page, locator, text):
    """Wait until an element has a text."""
    locator.and_(page.get_by_text(text, exact=True)).wait_for()


# ------------------------------------------------------------------------------------------------
# following

def test_a_log_is_followed_as_it_grows_while_the_page_is_open(browser, base_dir, server):
    page = open_page(browser, server)
    status = page.get_by_role("status").filter(has_text="Nothing has trained")
    status.wait_for()
    assert page.locator("section").filter(visible=True).count() == 0

    # 1. the run begins
    run = MadeRun(base_dir)
    with lock_folder(run.folder, 0):
        page.get_by_text("its first step is being prepared").wait_for()
        run.write(opening(), *steps(1, 5))
        page.get_by_text("base_train of d4 is training.").wait_for()
        wait_for(page, tile(page, "step"), "5 of 40")
        assert page.get_by_role("progressbar").get_attribute("value") == "0.125"
        assert page.title() == "12 % · d4 · nanochat"

        # 2. it grows, a half line first
        run.write(*steps(6, 20), samples(20, "Once", "upon a time"), '{"step": 21, "lo')
        wait_for(page, tile(page, "step"), "20 of 40")
        assert tile(page, "time left").inner_text() == "40 s"
        assert page.get_by_text("upon a time").is_visible()
        run.write('ss": 9.5, "tokens": 2100, "seconds": 42}\n', validation(21, 1.5))
        wait_for(page, tile(page, "step"), "21 of 40")
        wait_for(page, tile(page, "bits per byte"), "1.500")
        assert plot(page, "Bits per byte").locator("circle").count() == 1

    # 3. it ends
    run.save(21, finished=True)
    page.get_by_text("base_train of d4 has finished, after 21 steps.").wait_for()
    assert tile(page, "time left").count() == 0
    assert page.problems == [] and page.elsewhere == []
    page.context.close()


def test_a_server_that_ends_is_told_and_what_was_shown_stays(browser, run):
    with serve() as address:
        page = open_page(browser, SimpleNamespace(address=address))
        wait_for(page, tile(page, "step"), "20 of 40")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert "is python -m nanochat.report --serve still running?" in alert.inner_text()
    assert tile(page, "step").inner_text() == "20 of 40"
    page.context.close()


def test_what_a_model_writes_is_text(page, run):
    run.write(samples(20, ATTACK, ATTACK), {"step": 20, "skipped": ATTACK, "verdict": "skip"})
    page.get_by_role("heading", name=ATTACK).wait_for()
    assert page.locator("#samples dd").inner_text() == ATTACK
    assert ATTACK in page.locator("#notes").inner_text()
    assert "owned" not in page.title()
    assert page.locator("img").count() == 0 and page.locator("script").count() == 1
    assert page.problems == [] and page.elsewhere == []


def test_the_policy_of_the_page_lets_no_other_script_run(page):
    ran = page.evaluate("""() => {
      const script = document.createElement("script");
      try { script.textContent = "document.title = 'owned'"; document.body.append(script); }
      catch (error) { return error.name; }
      return document.title;
    }""")
    assert ran == "TypeError"


def test_what_has_not_changed_is_left_alone(page, run):
    """So that nothing is said twice, and what is opened stays open."""
    run.write(samples(19, "Once", "a"), samples(20, "Once", "b"))
    page.locator("#samples summary").click()
    page.evaluate("""() => {
      window.changes = [];
      const watch = (node, options) => new MutationObserver((all) => window.changes.push(...all))
        .observe(node, {childList: true, characterData: true, subtree: true});
      for (const id of ["words", "samples", "finished", "folder"]) {
        watch(document.getElementById(id));
      }
    }""")
    run.write(*steps(21, 25))
    wait_for(page, tile(page, "step"), "25 of 40")
    assert page.evaluate("window.changes.length") == 0
    assert page.locator("#samples details").get_attribute("open") is not None


def test_a_page_that_nobody_looks_at_does_not_ask(page):
    asked = []
    page.on("request", lambda request: asked.append(time.monotonic()))
    page.evaluate("""() => {
      Object.defineProperty(document, "hidden", {value: true, configurable: true});
      document.dispatchEvent(new Event("visibilitychange"));
    }""")
    page.wait_for_timeout(2500)  # a question that was due before is asked in vain
    asked.clear()
    page.wait_for_timeout(2500)
    assert asked == []
    with page.expect_request("**/state"):
        page.evaluate("""() => {
          Object.defineProperty(document, "hidden", {value: false, configurable: true});
          document.dispatchEvent(new Event("visibilitychange"));
        }""")


# ------------------------------------------------------------------------------------------------
# curves

def test_a_curve_is_read_with_the_arrow_keys(page):
    loss = plot(page, "Loss")
    assert loss.get_attribute("aria-valuetext") == "step 20: 4.8"
    loss.focus()
    for key, words in [
        ("ArrowLeft", "step 19: 4.81"),
        ("ArrowLeft", "step 18: 4.82"),
        ("ArrowRight", "step 19: 4.81"),
        ("PageDown", "step 17: 4.83"),
        ("Home", "step 1: 4.99"),
        ("ArrowLeft", "step 1: 4.99"),
        ("End", "step 20: 4.8"),
    ]:
        page.keyboard.press(key)
        assert loss.get_attribute("aria-valuetext") == words, key
        assert page.locator("figure", has=loss).locator("output").inner_text() == words
    assert loss.get_attribute("aria-valuenow") == loss.get_attribute("aria-valuemax") == "20"


def test_every_curve_is_reached_by_tab(page):
    names = []
    for _ in range(12):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label') || ''"))
    found = [name.partition(" by step")[0] for name in names if "arrow keys" in name]
    assert found[:2] == ["Loss", "Bits per byte"]


def test_a_curve_is_read_with_a_pointer_and_keeps_its_place_as_it_grows(page, run):
    loss = plot(page, "Loss")
    box = loss.bounding_box()
    page.mouse.move(box["x"] + 46 + 1, box["y"] + 50)
    assert loss.get_attribute("aria-valuetext") == "step 1: 4.99"
    run.write(*steps(21, 40))
    wait_for(page, tile(page, "step"), "40 of 40")
    assert loss.get_attribute("aria-valuetext") == "step 1: 4.99"
    page.mouse.move(0, 0)
    assert loss.get_attribute("aria-valuetext") == "step 40: 4.6"


def test_the_line_of_a_curve_goes_where_its_numbers_are(page):
    """The loss falls by the same at each step: the line is straight, from corner to corner."""
    text = plot(page, "Loss").locator("polyline.course").get_attribute("points")
    points = [tuple(map(float, pair.split(","))) for pair in text.split()]
    assert len(points) == 20
    (x0, y0), (x1, y1) = points[0], points[-1]
    assert x0 < x1 and y0 < y1, "down is where y grows"
    for i, (x, y) in enumerate(points):
        assert abs(x - x0 - (x1 - x0) * i / 19) < 0.2
        assert abs(y - y0 - (y1 - y0) * i / 19) < 0.2
    box = plot(page, "Loss").bounding_box()
    assert 40 < x0 < 60 and box["width"] - 30 < x1 <= box["width"]


def test_a_curve_is_there_as_a_table(page, run):
    page.get_by_text("As a table").first.click()
    rows = page.locator("figure").first.locator("tr")
    assert rows.first.inner_text().split() == ["step", "loss"]
    assert rows.nth(1).inner_text().split() == ["1", "4.99"]
    assert rows.last.inner_text().split() == ["20", "4.8"]
    run.write(*steps(21, 30))
    wait_for(page, tile(page, "step"), "30 of 40")
    assert rows.last.inner_text().split() == ["30", "4.7"]


def test_numbers_that_hardly_differ_have_ticks_that_do(page, run):
    run.write(validation(20, 2.4985), *steps(21, 30), validation(30, 2.4981))
    wait_for(page, tile(page, "step"), "30 of 40")
    ticks = plot(page, "Bits per byte").locator("text[text-anchor=end]").all_text_contents()
    assert len(ticks) >= 2 and len(set(ticks)) == len(ticks)


# ------------------------------------------------------------------------------------------------
# looks

@pytest.mark.parametrize("size", [DESKTOP, PHONE, SMALL_PHONE], ids=["desktop", "phone", "small"])
def test_the_page_is_as_wide_as_the_screen(browser, run, server, size):
    run.write(samples(20, "x" * 200, "y" * 400), validation(20, 2.0))
    page = open_page(browser, server, size)
    wait_for(page, tile(page, "step"), "20 of 40")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert plot(page, "Loss").bounding_box()["width"] > 200
    assert page.problems == []
    page.context.close()


# (what is drawn, on what, the least contrast: 4.5 for text, 3 for lines that are read)
PAIRS = [
    ("ink", "paper", 4.5),
    ("ink", "raised", 4.5),
    ("soft", "paper", 4.5),
    ("soft", "raised", 4.5),
    ("error", "paper", 4.5),
    ("accent", "raised", 3),
    ("accent", "paper", 3),
    ("good", "paper", 3),
    ("edge", "raised", 3),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_and_line_has_the_contrast_of_wcag_aa(page, scheme):
    page.emulate_media(color_scheme=scheme)
    assert not low_contrasts(page, PAIRS)


def test_no_line_of_the_page_is_over_100_columns():
    assert not [line for line in PAGE.split("\n") if len(line) > 100]


def test_without_javascript_the_page_says_what_it_needs(browser, server):
    without = ["--no-sandbox", "--blink-settings=scriptEnabled=false"]
    with browser.browser_type.launch(executable_path=CHROMIUM, args=without) as browser:
        page = open_page(browser, server)
        assert "with JavaScript" in page.locator(".noscript").inner_text()
        assert page.locator("#desk").is_hidden()
