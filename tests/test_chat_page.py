"""The chat page in a headless Chromium, against the real server and a model that is played."""
import shutil

import pytest
from chat_fakes import FakeEngine, serve

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
if not shutil.which(CHROMIUM):
    pytest.skip(f"{CHROMIUM} is not there", allow_module_level=True)

ATTACK = ("<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
          "<a href='javascript:document.title=1'>x</a>")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:
            yield browser


@pytest.fixture(scope="module")
def served():
    engine = FakeEngine()
    with serve(engine) as address:
        yield engine, address


@pytest.fixture
def engine(served):
    served[0].__init__()
    return served[0]


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=["desktop", "phone"])
def page(request, browser, engine, served):
    page = open_page(browser, request.param, served[1])
    yield page
    engine.gate.set()
    page.close()


def open_page(browser, size, address):
    """The page of a server, with a list of `problems` that its console names."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    page.set_default_timeout(20_000)
    problems = []

    def on_console(message):
        if message.type == "error":
            problems.append(message.text)

    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", on_console)
    page.goto(address + "/")
    page.problems = problems
    return page


def ask(page, question):
    page.get_by_label("Your message").fill(question)
    page.get_by_label("Your message").press("Enter")


def shown(page, kind):
    return [element.inner_text() for element in page.locator(f".{kind}").all()]


def wait_for_end(page):
    page.get_by_role("button", name="Send").wait_for()


def test_a_conversation(page, engine):
    sync_api.expect(page.locator("#model")).to_have_text("test")
    assert page.get_by_role("button", name="Send").is_disabled()
    ask(page, "first")
    wait_for_end(page)
    ask(page, "second")
    wait_for_end(page)
    assert shown(page, "user") == ["first", "second"]
    assert shown(page, "assistant") == ["Hello 🙂!"] * 2
    prompts = ["".join(map(chr, call["prompt"])) for call in engine.calls]
    assert prompts[1] == "\1\2first\2Hello 🙂!\2second\3"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.problems == []


def test_the_answer_appears_while_it_is_made(page, engine):
    engine.pieces = ["one ", "two"]
    engine.gate.clear()
    ask(page, "count")
    page.locator(".waiting").wait_for()
    engine.gate.set()
    wait_for_end(page)
    assert shown(page, "assistant") == ["one two"]
    assert page.locator(".waiting, .writing").count() == 0


def test_stop_keeps_what_came_and_frees_the_model(page, engine):
    class Slow(list):       # the gate closes behind the first piece
        def __getitem__(self, item):
            return self

        def __iter__(self):
            yield "begun"
            engine.gate.clear()
            yield from ["more"] * 1000
    engine.pieces = Slow(["x"])
    ask(page, "tell me")
    page.get_by_text("begun").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert shown(page, "assistant") == ["begun"]
    engine.gate.set()
    engine.pieces = ["done"]
    ask(page, "go on")
    wait_for_end(page)
    assert shown(page, "assistant") == ["begun", "done"]
    assert "".join(map(chr, engine.calls[1]["prompt"])) == "\1\2tell me\2begun\2go on\3"


def test_stop_before_the_first_word_gives_the_question_back(page, engine):
    engine.gate.clear()
    ask(page, "never mind")
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    assert page.get_by_label("Your message").input_value() == "never mind"
    engine.gate.set()
    ask(page, "again")
    wait_for_end(page)
    assert "".join(map(chr, engine.calls[-1]["prompt"])) == "\1\2again\3"


def test_new_chat_forgets_and_abandons_the_unfinished_answer(page, engine):
    engine.gate.clear()
    ask(page, "old")
    page.get_by_role("button", name="New chat").click()
    page.get_by_text("What would you like to ask?").wait_for()
    engine.gate.set()
    ask(page, "new")
    wait_for_end(page)
    assert shown(page, "user") == ["new"] and shown(page, "assistant") == ["Hello 🙂!"]
    assert "".join(map(chr, engine.calls[-1]["prompt"])) == "\1\2new\3"


def test_what_the_model_writes_is_inert(page, engine):
    engine.pieces = [ATTACK]
    ask(page, ATTACK)
    wait_for_end(page)
    assert shown(page, "assistant") == [ATTACK] == shown(page, "user")
    assert page.locator("#log img, #log a, #log script").count() == 0
    assert page.title() == "nanochat" and page.problems == []
    page.evaluate("""const script = document.createElement("script");
                     script.textContent = "document.title = 'owned'";
                     document.body.append(script)""")
    assert page.title() == "nanochat"      # and markup that did get in would not run


def test_errors_and_limits_are_told(page, engine):
    engine.pieces = [RuntimeError("inside")]
    ask(page, "fail")
    page.locator(".note.error", has_text="the model failed").wait_for()
    assert page.get_by_label("Your message").input_value() == "fail"
    ask(page, "x" * 5000)
    page.locator(".note.error", has_text="shorten it").wait_for()
    engine.pieces = ["x"] * 500
    ask(page, "long")
    page.locator(".note", has_text="Cut off").wait_for()


def test_keyboard_and_suggestions(page, engine):
    box = page.get_by_label("Your message")
    box.fill("one")
    box.press("Shift+Enter")
    box.type("two")
    assert box.input_value() == "one\ntwo" and shown(page, "user") == []
    box.fill("  \n ")
    box.press("Enter")
    assert shown(page, "user") == []
    page.get_by_role("button", name="Who are you?").click()
    wait_for_end(page)
    assert shown(page, "user") == ["Who are you?"]


def test_a_base_model_continues_the_text_in_its_place(browser):
    engine = FakeEngine()
    with serve(engine, continues=True, suggestions=["Die Uhr"]) as address:
        page = open_page(browser, (1280, 800), address)
        page.get_by_text("It continues a text, and does not answer.").wait_for()
        page.get_by_role("button", name="Die Uhr").click()
        wait_for_end(page)
        page.get_by_label("Your text").fill("The sea ")
        page.get_by_label("Your text").press("Enter")
        wait_for_end(page)
        assert shown(page, "assistant") == ["Die UhrHello 🙂!", "The sea Hello 🙂!"]
        assert shown(page, "given") == ["Die Uhr", "The sea "] and shown(page, "user") == []
        prompts = ["".join(map(chr, call["prompt"])) for call in engine.calls]
        assert prompts == ["\1Die Uhr", "\1The sea "]

        engine.pieces = [ATTACK]
        page.get_by_label("Your text").fill(ATTACK)
        page.get_by_label("Your text").press("Enter")
        wait_for_end(page)
        assert shown(page, "assistant")[-1] == ATTACK * 2
        engine.pieces = [RuntimeError("inside")]
        page.get_by_label("Your text").fill("fail")
        page.get_by_label("Your text").press("Enter")
        page.locator(".note.error", has_text="the model failed").wait_for()
        assert page.get_by_label("Your text").input_value() == "fail"
        assert page.title() == "nanochat"
        page.close()
