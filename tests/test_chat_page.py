"""The chat page in a headless Chromium: chats, answers, errors, keyboard, looks.

Its server is played (page_fakes.py), but for the first test. test_chat_page_markdown.py has what
the text of an answer becomes.
"""
import json
import re

import pytest

from chat_fakes import FakeEngine, serve
from page_fakes import (
    CHROMIUM,
    DESKTOP,
    GATE_SECONDS,
    PHONE,
    SMALL_PHONE,
    Played,
    PlayedServer,
    ask,
    contrast,
    error_body,
    launch_chromium,
    low_contrasts,
    open_page,
    shown,
    wait_for_end,
)

ATTACK = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">\n"
    "[a](javascript:document.title='owned') [b](data:text/html,<script>1</script>)\n"
    "![x](http://evil.example/) ![y](data:image/png;base64,AAAA)\n"
    "```html\n<img src=http://evil.example/ onerror=alert(1)>\n```\n"
)
LONG = "\n\n".join(f"Paragraph {number}." for number in range(60))


@pytest.fixture(scope="module")
def browser():
    with launch_chromium() as browser:
        yield browser


@pytest.fixture
def server():
    with PlayedServer() as server:
        yield server


@pytest.fixture
def page(browser, server):
    page = open_page(browser, server)
    yield page
    server.gate.set()
    page.context.close()


@pytest.fixture(params=[DESKTOP, PHONE], ids=["desktop", "phone"])
def any_page(request, browser, server):
    page = open_page(browser, server, request.param)
    yield page
    page.context.close()


def button(page, name):
    return page.get_by_role("button", name=name, exact=True)


def in_log(page, text, exact=False):
    """What has a text in the conversation: a screen reader's words have it, too."""
    return page.locator("#log").get_by_text(text, exact=exact)


def roles(fields):
    """The messages of a request as "user: text" lines."""
    return [f"{message['role']}: {message['content']}" for message in fields["messages"]]


def titles(page):
    return page.locator("#chats .open").all_inner_texts()


# ------------------------------------------------------------------------------------------------
# answers

def test_a_conversation_with_the_real_server(browser):
    engine = FakeEngine()
    with serve(engine) as address:
        page = browser.new_page()
        page.goto(address + "/")
        ask(page, "first")
        wait_for_end(page)
        ask(page, "second")
        wait_for_end(page)
        assert shown(page, "user") == ["first", "second"]
        assert shown(page, "assistant") == ["Hello 🙂!"] * 2
        page.close()


def test_a_conversation(any_page, server):
    page = any_page
    assert page.locator("#model").inner_text() == "test"
    assert button(page, "Send").is_disabled()
    ask(page, "  first ")
    wait_for_end(page)
    ask(page, "second")
    wait_for_end(page)
    assert shown(page, "user") == ["first", "second"]
    assert shown(page, "assistant") == ["Hello 🙂!"] * 2
    assert roles(server.asked()[1]) == ["user: first", "assistant: Hello 🙂!", "user: second"]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.problems == []


def test_an_answer_appears_while_it_is_made_and_tells_its_speed(page, server):
    server.answers = [Played(["one **t", "wo**", " three"], gate=2)]
    ask(page, "count")
    in_log(page, "one two", exact=True).wait_for()
    assert page.locator("strong").inner_text() == "two"
    page.wait_for_timeout(100)
    server.gate.set()
    wait_for_end(page)
    assert shown(page, "assistant") == ["one two three"]
    note = page.locator(".note").inner_text()
    assert re.fullmatch(r"test · 3 tokens · [\d.]+ tokens/s · first after \d\.\d\d s", note)
    assert page.locator(".waiting, .writing").count() == 0


def test_without_a_count_of_tokens_none_is_told(page, server):
    server.answers = [Played(has_usage=False)]
    ask(page, "count")
    wait_for_end(page)
    assert re.fullmatch(r"test · first after \d\.\d\d s", page.locator(".note").inner_text())


def test_an_answer_without_words_and_one_cut_off_say_so(page, server):
    server.answers = [Played([]), Played(["long"], finish="length")]
    ask(page, "nothing")
    in_log(page, "The model had nothing to say.").wait_for()
    ask(page, "much")
    in_log(page, "Cut off at the most tokens allowed.").wait_for()
    # an empty answer and its question are no part of what the model is told
    assert roles(server.asked()[1]) == ["user: much"]


@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_keeps_what_came_and_leaves_the_server(page, server, way):
    server.answers = [Played(["begun", *[" more"] * 2000], gate=1)]
    ask(page, "tell me")
    in_log(page, "begun").wait_for()
    if way == "button":
        button(page, "Stop").click()
    else:
        page.keyboard.press("Escape")
    in_log(page, "Stopped.").wait_for()
    assert shown(page, "assistant") == ["begun"]
    server.gate.set()
    assert server.left.wait(GATE_SECONDS)
    server.answers = [Played(["done"])]
    ask(page, "continue")
    wait_for_end(page)
    history = ["user: tell me", "assistant: begun", "user: continue"]
    assert roles(server.asked()[1]) == history


def test_stop_before_the_first_word_gives_the_question_back(page, server):
    server.answers = [Played(gate=0)]
    ask(page, "never mind")
    button(page, "Stop").click()
    wait_for_end(page)
    assert page.get_by_label("Your message").input_value() == "never mind"
    assert shown(page, "user") == [] and titles(page) == []
    server.gate.set()
    ask(page, "again")
    wait_for_end(page)
    assert shown(page, "user") == ["again"] and titles(page) == ["again"]
    assert roles(server.asked()[-1]) == ["user: again"]


def test_regenerate_replaces_the_answer_and_undo_brings_it_back(page, server):
    server.answers = [Played(["old"]), Played(["new"])]
    ask(page, "question")
    wait_for_end(page)
    button(page, "Regenerate").click()
    in_log(page, "new", exact=True).wait_for()
    wait_for_end(page)
    assert shown(page, "assistant") == ["new"]
    assert roles(server.asked()[1]) == ["user: question"]
    button(page, "Undo").click()
    assert shown(page, "assistant") == ["old"]
    page.reload()
    page.locator("#chats .open").click()
    assert shown(page, "assistant") == ["old"]


def test_an_edited_question_is_asked_from_there(page, server):
    for question in ("first", "second"):
        ask(page, question)
        wait_for_end(page)
    page.locator(".user").first.hover()
    button(page, "Edit").first.click()
    page.get_by_label("Edit your message").fill("better")
    page.get_by_label("Edit your message").press("Enter")
    wait_for_end(page)
    assert shown(page, "user") == ["better"]
    assert roles(server.asked()[-1]) == ["user: better"]
    button(page, "Undo").click()
    assert shown(page, "user") == ["first", "second"]


def test_arrow_up_edits_the_last_question_and_escape_leaves_it(page, server):
    ask(page, "first")
    wait_for_end(page)
    page.get_by_label("Your message").press("ArrowUp")
    editor = page.get_by_label("Edit your message")
    assert editor.input_value() == "first"
    editor.press("Escape")
    assert shown(page, "user") == ["first"]
    page.get_by_label("Your message").fill("draft")
    page.get_by_label("Your message").press("ArrowUp")
    assert editor.count() == 0


def test_an_edit_that_is_left_while_an_answer_is_made_leaves_the_answer(page, server):
    ask(page, "first")
    wait_for_end(page)
    server.answers = [Played(["so ", "far"], gate=1)]
    ask(page, "second")
    in_log(page, "so", exact=True).wait_for()
    page.locator(".user").first.hover()
    button(page, "Edit").first.click()
    button(page, "Cancel").click()
    server.gate.set()
    wait_for_end(page)
    assert shown(page, "assistant") == ["Hello 🙂!", "so far"]


def test_a_question_is_deleted_with_its_answer_and_comes_back(page, server):
    ask(page, "first")
    wait_for_end(page)
    page.locator(".user").hover()
    button(page, "Delete").click()
    assert shown(page, "user") == [] and titles(page) == []
    button(page, "Undo").click()
    assert shown(page, "user") == ["first"] and titles(page) == ["first"]


def test_messages_and_code_are_copied(browser, server):
    server.answers = [Played(["```py\nx = 1\n```"])]
    granted = ["clipboard-read", "clipboard-write"]
    page = open_page(browser, server, permissions=granted)
    ask(page, "code")
    wait_for_end(page)
    button(page, "Copy the code").click()
    page.get_by_text("Copied", exact=True).wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1"
    page.locator(".assistant .actions").get_by_label("Copy").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()).includes('```py')")
    page.context.close()


# ------------------------------------------------------------------------------------------------
# errors

HTML = "<html><body>502 Bad Gateway nginx</body></html>"


@pytest.mark.parametrize("answer, sentence", [
    (Played(status=502, body=HTML), "The model's server cannot be reached through this address."),
    (Played(status=413, body=HTML), "That is more text than the server takes."),
    (Played(status=418, body="{}"), "The server failed with status 418."),
    (Played(status=400, body=error_body("the question is long: shorten it")),
     "The question is long: shorten it."),
    (Played(status=429, body=error_body("the queue is full"), headers={"Retry-After": "3"}),
     "The queue is full. Try again in 3 seconds."),
    (Played(status=503, body=HTML), "The server takes no questions at the moment."),
    (Played([], error="the model failed"), "The model failed."),
    (Played([], finish=None), "The connection broke off before the answer was complete."),
])
def test_an_error_is_a_sentence_with_another_try(page, server, answer, sentence):
    server.answers = [answer, Played(["better"])]
    ask(page, "question")
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert sentence in alert.inner_text()
    button(page, "Try again").click()
    in_log(page, "better", exact=True).wait_for()
    wait_for_end(page)
    assert alert.count() == 0 and shown(page, "user") == ["question"]
    assert roles(server.asked()[1]) == ["user: question"]
    assert page.problems == []


def test_what_came_before_a_stream_broke_off_is_kept(page, server):
    server.answers = [Played(["half an ", "answer"], finish=None), Played()]
    ask(page, "question")
    page.get_by_role("alert").wait_for()
    assert shown(page, "assistant") == ["half an answer"]
    page.reload()
    page.locator("#chats .open").click()
    assert shown(page, "assistant") == ["half an answer"]
    assert "broke off" in page.get_by_role("alert").inner_text()


def test_a_question_that_failed_is_not_part_of_the_conversation(page, server):
    server.answers = [Played(status=400, body=error_body("no")), Played()]
    ask(page, "failing")
    page.get_by_role("alert").wait_for()
    ask(page, "next")
    wait_for_end(page)
    assert roles(server.asked()[1]) == ["user: next"]


def test_a_page_of_a_proxy_in_place_of_an_answer_is_told(page):
    page.route("**/v1/**", lambda route: route.fulfill(body=HTML, content_type="text/html"))
    ask(page, "question")
    in_log(page, "What answers at this address is no chat server.").wait_for()


def test_a_server_that_is_away_is_told(browser):
    with PlayedServer() as server:
        page = open_page(browser, server)
        page.locator("#suggestions .pill").first.wait_for()
    ask(page, "question")
    in_log(page, "The server does not answer. Is it still running?").wait_for()
    page.context.close()


def test_a_question_waits_until_the_model_is_loaded(browser, server):
    server.answers = [Played(status=503, body=error_body("loading")), Played(["loaded"])]
    server.is_ready = False
    page = open_page(browser, server)
    page.get_by_text("The model is being loaded …").wait_for()
    ask(page, "question")
    in_log(page, "The model is being loaded.").wait_for()
    server.is_ready = True
    in_log(page, "loaded", exact=True).wait_for()
    wait_for_end(page)
    assert shown(page, "assistant") == ["loaded"] and titles(page) == ["question"]
    assert page.locator(".note").inner_text().startswith("test · ")
    page.context.close()


def test_a_server_with_a_key_is_asked_with_it(browser):
    with PlayedServer(needs_key=True) as server:
        server.key = "right"
        page = open_page(browser, server)
        page.get_by_role("textbox", name="Key").fill("wrong")
        button(page, "Continue").click()
        ask(page, "question")
        in_log(page, "The server asks for a key, and the one it got is not right.").wait_for()
        page.get_by_text("The key that was given is not the right one.").wait_for()
        page.get_by_role("textbox", name="Key").fill("right")
        button(page, "Continue").click()
        in_log(page, "Hello 🙂!").wait_for()
        assert shown(page, "user") == ["question"]
        assert "right" not in page.evaluate("JSON.stringify(localStorage)")
        page.reload()       # it holds as long as the tab
        ask(page, "again")
        in_log(page, "Hello 🙂!").wait_for()
        page.context.close()


# ------------------------------------------------------------------------------------------------
# chats

def test_chats_are_kept_renamed_deleted_and_brought_back(page, server):
    for question in ("first question\nmore", "second " * 20):
        ask(page, question)
        wait_for_end(page)
        button(page, "New chat").click()
    page.reload()
    page.locator("#chats .open").first.wait_for()
    assert titles(page)[1] == "first question"
    assert titles(page)[0].startswith("second second") and titles(page)[0].endswith("…")

    page.locator("#chats li").nth(1).hover()
    page.get_by_label("Rename first question").click()
    page.get_by_label("Title of the chat").fill("renamed")
    page.get_by_label("Title of the chat").press("Enter")
    page.get_by_text("renamed").click()
    assert shown(page, "user") == ["first question\nmore"]

    page.locator("#chats li").nth(1).hover()
    page.get_by_label("Delete renamed").click()
    assert len(titles(page)) == 1 and shown(page, "user") == []
    button(page, "Undo").click()
    assert shown(page, "user") == ["first question\nmore"]
    page.reload()
    page.get_by_text("renamed").wait_for()


def test_a_new_chat_leaves_the_unfinished_answer_in_its_own(page, server):
    server.answers = [Played(["begun", "more"], gate=1), Played(["new"])]
    ask(page, "old")
    in_log(page, "begun").wait_for()
    button(page, "New chat").click()
    page.locator("#welcome").get_by_text("What would you like to ask?").wait_for()
    ask(page, "next")
    wait_for_end(page)
    assert shown(page, "assistant") == ["new"]
    assert roles(server.asked()[1]) == ["user: next"]
    page.get_by_role("button", name="old", exact=True).click()
    assert shown(page, "assistant") == ["begun"]


def test_opening_the_chat_that_is_shown_does_not_stop_its_answer(page, server):
    server.answers = [Played(["so ", "far"], gate=1)]
    ask(page, "question")
    in_log(page, "so", exact=True).wait_for()
    page.locator("#chats .open").click()
    server.gate.set()
    wait_for_end(page)
    assert shown(page, "assistant") == ["so far"]


def test_a_page_that_is_left_keeps_what_came(page, server):
    server.answers = [Played(["begun", "more"], gate=1)]
    ask(page, "question")
    in_log(page, "begun").wait_for()
    page.reload()
    page.locator("#chats .open").click()
    assert shown(page, "assistant") == ["begun"]


def test_a_full_memory_is_told_and_the_chat_continues(page, server):
    page.evaluate("""() => {
      for (let size = 1 << 22; size; size >>= 1) {
        for (let part = 0; part < 4; part += 1) {
          try { localStorage.setItem(`${size} ${part}`, "x".repeat(size)); } catch { break; }
        }
      }
    }""")
    ask(page, "question")
    page.get_by_text("This browser's room for chats is full").wait_for()
    wait_for_end(page)
    assert shown(page, "assistant") == ["Hello 🙂!"]


def test_what_is_no_chat_in_the_memory_is_passed_over(page):
    broken = ["{", "null", "[]", json.dumps({"id": 1, "messages": [{"role": "user"}]})]
    for number, text in enumerate(broken):
        page.evaluate("([key, text]) => localStorage.setItem(key, text)",
                      [f"nanochat.chat.{number}", text])
    page.reload()
    ask(page, "question")
    wait_for_end(page)
    assert titles(page) == ["question"] and page.problems == []


@pytest.mark.parametrize("settings", [
    {"temperature": {"a": 1}, "system": [1], "theme": 5, "seed": None}, [], "dark", 5,
])
def test_what_is_no_setting_in_the_memory_is_passed_over(page, server, settings):
    page.evaluate("text => localStorage.setItem('nanochat.settings', text)", json.dumps(settings))
    page.reload()
    ask(page, "question")
    wait_for_end(page)
    assert shown(page, "assistant") == ["Hello 🙂!"] and page.problems == []


def test_two_tabs_see_each_others_chats(page, server):
    other = page.context.new_page()
    other.goto(server.address + "/")
    ask(other, "from the other")
    wait_for_end(other)
    page.get_by_text("from the other").wait_for()


# ------------------------------------------------------------------------------------------------
# settings

def test_settings_are_sent_and_remembered(browser):
    with PlayedServer(defaults={"temperature": 0.6, "top_k": 50}, context=1024) as server:
        page = open_page(browser, server)
        ask(page, "plain")
        wait_for_end(page)
        usual = {"messages", "stream", "stream_options"}
        assert server.asked()[0].keys() == usual

        button(page, "Settings").click()
        assert page.get_by_label("Temperature").get_attribute("placeholder") == "0.6"
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("0.25")
        page.get_by_label("Top p").fill("0.9")
        page.get_by_label("Top k").fill("-1")       # refused, so not taken
        page.get_by_label("Max tokens").fill("100")
        page.get_by_label("Seed").fill("0")
        page.get_by_label("Dark").check()
        page.keyboard.press("Escape")
        page.reload()
        ask(page, "set")
        wait_for_end(page)
        fields = server.asked()[1]
        assert roles(fields) == ["system: Be brief.", "user: set"]
        sent = {name: fields[name] for name in fields.keys() - usual}
        assert sent == {"temperature": 0.25, "top_p": 0.9, "max_tokens": 100, "seed": 0}
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"

        button(page, "Settings").click()
        button(page, "Reset").click()
        button(page, "Done").click()
        ask(page, "plain")
        wait_for_end(page)
        assert server.asked()[2].keys() == usual
        page.context.close()


def test_a_server_that_says_nothing_about_itself_is_talked_to(page, server):
    server.about = {}
    page.reload()
    ask(page, "question")
    wait_for_end(page)
    assert shown(page, "assistant") == ["Hello 🙂!"] and page.problems == []


# ------------------------------------------------------------------------------------------------
# what is written is inert

def test_what_the_model_and_the_user_write_is_inert(page, server):
    server.answers = [Played([ATTACK])]
    ask(page, ATTACK)
    wait_for_end(page)
    assert shown(page, "user") == [ATTACK.strip()]
    assert "<script>document.title" in shown(page, "assistant")[0]
    assert page.locator("#log :is(img, script, iframe, object, form, style)").count() == 0
    links = page.locator("#log a").evaluate_all("links => links.map(link => link.href)")
    assert links == ["http://evil.example/"]
    assert page.title() == "nanochat" and page.problems == [] and page.elsewhere == []

    # the page cannot make markup of a text, and a script that did get in would not run
    for sink in ("document.body.innerHTML = '<p>'", "document.createElement('script').text = '1'"):
        with pytest.raises(Exception, match="requires 'Trusted"):
            page.evaluate(sink)
    page.evaluate("""const script = document.createElement("script");
                     script.append("document.title = 'owned'");
                     document.body.append(script)""")
    assert page.title() == "nanochat"


def test_a_chat_that_somebody_put_into_the_memory_is_inert(page):
    message = {"role": "assistant", "content": ATTACK, "note": ATTACK, "error": ATTACK}
    question = {"role": "user", "content": ATTACK}
    chat = {"id": "x", "title": ATTACK, "messages": [question, message], "updated": 1}
    page.evaluate("text => localStorage.setItem('nanochat.chat.x', text)", json.dumps(chat))
    page.reload()
    page.locator("#chats .open").click()
    page.get_by_role("alert").wait_for()
    assert page.locator("#log img, #chats img, #log script").count() == 0
    assert page.title() == "nanochat" and page.problems == [] and page.elsewhere == []


# ------------------------------------------------------------------------------------------------
# keyboard, screen readers, looks

def test_keyboard_and_suggestions(page):
    box = page.get_by_label("Your message")
    box.fill("one")
    box.press("Shift+Enter")
    box.type("two")
    assert box.input_value() == "one\ntwo" and shown(page, "user") == []
    box.fill("  \n ")
    box.press("Enter")
    assert shown(page, "user") == []
    page.get_by_role("button", name="Who are you?").press("Enter")
    wait_for_end(page)
    assert shown(page, "user") == ["Who are you?"]


def test_every_control_has_a_name_and_a_visible_focus(page):
    ask(page, "question")
    wait_for_end(page)
    page.get_by_label("Your message").focus()
    outlines = {}
    for _ in range(16):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
          const element = document.activeElement;
          const name = element.ariaLabel || element.textContent;
          return [element === document.body ? "the browser" : name,
                  getComputedStyle(element).outlineStyle];
        }""")
        outlines[name] = outline
    del outlines["the browser"]         # after the last control
    assert outlines.pop("Your message") == "none"       # the frame around the box is drawn instead
    controls = {"New chat", "question", "Rename question", "Settings", "Conversation"}
    assert controls | {"Copy", "Edit", "Delete", "Regenerate"} <= outlines.keys()
    assert set(outlines.values()) <= {"solid", "auto"}
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea")]
      .filter(it => !(it.ariaLabel || it.textContent.trim() || it.labels?.length)).length""")
    assert unnamed == 0


def test_screen_readers_hear_sentences_and_not_tokens(page, server):
    page.evaluate("""() => {
      window.heard = [];
      new MutationObserver(() => heard.push(document.getElementById("spoken").textContent))
        .observe(document.getElementById("spoken"), {childList: true});
    }""")
    server.answers = [Played([*"One sentence. And another one", "."])]
    ask(page, "question")
    wait_for_end(page)
    heard = page.evaluate("heard")
    assert "".join(heard).split() == "One sentence. And another one.".split()
    assert len(heard) <= 2
    assert page.get_by_role("log").get_attribute("aria-live") == "off"


def test_the_end_is_followed_until_the_reader_scrolls_away(page, server):
    server.answers = [Played([LONG, "\n\nlast"], gate=1)]
    ask(page, "long")
    in_log(page, "Paragraph 59.").wait_for()
    page.wait_for_function("distanceToEnd() < 5")
    page.evaluate("pane().scrollTop = 100")
    jump = page.get_by_label("Jump to the end")
    jump.wait_for()
    server.gate.set()
    wait_for_end(page)
    assert page.evaluate("pane().scrollTop") == 100
    jump.click()
    page.wait_for_function("distanceToEnd() < 5")
    jump.wait_for(state="hidden")


def test_the_drawer_of_a_phone_holds_the_chats(browser, server):
    page = open_page(browser, server, PHONE, is_mobile=True, has_touch=True)
    ask(page, "question")
    wait_for_end(page)
    page.locator("#top-fresh").click()
    assert page.locator("#drawer").is_hidden()
    button(page, "List of chats").click()
    page.locator("#chats .open").wait_for()
    page.keyboard.press("Escape")
    page.locator("#drawer").wait_for(state="hidden")
    button(page, "List of chats").click()
    page.locator("#chats .open").click()
    page.locator("#drawer").wait_for(state="hidden")
    assert shown(page, "user") == ["question"]
    page.context.close()


@pytest.mark.parametrize("size", [PHONE, SMALL_PHONE])
def test_nothing_is_wider_than_a_phone(browser, server, size):
    page = open_page(browser, server, size)
    button(page, "How tall is a tree?").wait_for()
    bottom = page.locator("#suggestions").evaluate("it => it.getBoundingClientRect().bottom")
    assert bottom < page.locator("#box").evaluate("it => it.getBoundingClientRect().top")

    wide = "| " + " | ".join(["a long heading"] * 12) + " |\n" + "|-" * 12 + "|\n"
    server.answers = [Played([wide + "\n```\n" + "x" * 300 + "\n```\n" + "y" * 300])]
    ask(page, "z" * 300)
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("pane().scrollWidth <= pane().clientWidth")
    button(page, "Settings").click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.context.close()


def test_contrast_is_that_of_wcag():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


# (what is drawn, on what, the least contrast: 4.5 for text, 3 for the edges of controls)
PAIRS = [
    ("ink", "paper", 4.5),
    ("ink", "side", 4.5),
    ("ink", "raised", 4.5),
    ("ink", "bubble", 4.5),
    ("ink", "chip", 4.5),
    ("soft", "paper", 4.5),
    ("soft", "side", 4.5),
    ("soft", "raised", 4.5),
    ("soft", "bubble", 4.5),
    ("accent", "paper", 4.5),
    ("on-accent", "accent", 4.5),
    ("error", "paper", 4.5),
    ("edge", "paper", 3),
    ("edge", "raised", 3),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(page, scheme):
    page.emulate_media(color_scheme=scheme)
    low = low_contrasts(page, PAIRS)
    assert not low


def test_no_line_of_the_page_is_over_100_columns():
    lines = PlayedServer().page.split("\n")
    assert not [line for line in lines if len(line) > 100]


def test_no_colour_stands_outside_of_the_table():
    page = PlayedServer().page
    rules = page.partition("/* --- Everywhere */")[2].partition("</style>")[0]
    assert not re.findall(r"#[0-9a-f]{3,8}\b(?=[;,\s)])", rules)


def test_without_javascript_the_page_says_what_it_needs(browser, server):
    without = ["--no-sandbox", "--blink-settings=scriptEnabled=false"]
    with browser.browser_type.launch(executable_path=CHROMIUM, args=without) as browser:
        page = open_page(browser, server)
        assert page.locator(".noscript").is_visible()
        assert "with JavaScript" in page.locator(".noscript").inner_text()
        assert page.get_by_label("Your message").is_hidden()


# ------------------------------------------------------------------------------------------------
# base models

def test_a_base_model_continues_the_text_in_its_place(browser):
    with PlayedServer(continues=True, suggestions=["Die Uhr"]) as server:
        server.answers = [Played([" schlug", " *zwölf*"])]
        page = open_page(browser, server)
        page.locator("#welcome").get_by_text("It continues a text, and does not answer.").wait_for()
        button(page, "Die Uhr").click()
        wait_for_end(page)
        assert shown(page, "assistant") == ["Die Uhr schlug *zwölf*"]
        assert page.locator(".given").inner_text() == "Die Uhr"
        button(page, "Continue further").click()
        wait_for_end(page)
        page.get_by_label("Your text").fill("The sea ")
        page.get_by_label("Your text").press("Enter")
        wait_for_end(page)
        prompts = [fields["prompt"] for fields in server.asked()]
        assert prompts == ["Die Uhr", "Die Uhr schlug *zwölf*", "The sea "]
        assert page.locator(".user:visible").count() == 0

        server.answers = [Played([ATTACK])]
        page.get_by_label("Your text").fill(ATTACK)
        page.get_by_label("Your text").press("Enter")
        wait_for_end(page)
        assert shown(page, "assistant")[-1].strip() == (ATTACK * 2).strip()
        assert page.title() == "nanochat" and page.problems == []
        page.reload()
        assert titles(page) == ["Die Uhr"]
        page.context.close()
