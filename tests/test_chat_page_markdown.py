"""The Markdown of the chat page, in a headless Chromium: what an answer becomes, and that it is
inert, in linear time, and steady while it is being written."""
import random
import re

import pytest

from page_fakes import PlayedServer, launch_chromium, open_page

HANGS_MS = 10_000       # linear work on a megabyte takes well under a second, quadratic work hours
MEGABYTE = 1_000_000

RENDER = """text => {
  const element = document.createElement("div");
  element.append(markdown(text));
  return element.innerHTML;
}"""
TIME = """([text, open]) => {
  const element = document.createElement("div"), began = performance.now();
  new MarkdownView(element).update(text, open);
  return performance.now() - began;
}"""
# The texts that are shown while an answer grows character by character, without white space and
# the names of languages, and the elements at the end in either way
GROW = """text => {
  const growing = document.createElement("div"), whole = document.createElement("div");
  const view = new MarkdownView(growing), shown = [];
  for (let end = 1; end <= text.length; end += 1) {
    view.update(text.slice(0, end), true);
    const copy = growing.cloneNode(true);
    for (const bar of copy.querySelectorAll(".code > div")) bar.remove();
    shown.push(copy.textContent.replace(/\\s/g, ""));
  }
  view.update(text, false);
  whole.append(markdown(text));
  return [shown, growing.innerHTML, whole.innerHTML];
}"""


@pytest.fixture(scope="module")
def page():
    with PlayedServer() as server, launch_chromium() as browser:
        yield open_page(browser, server)


def render(page, text):
    """The Markdown as HTML, without what every link and every block of code has."""
    html = page.evaluate(RENDER, text)
    html = re.sub(r' (target|rel|title|aria-label|type|tabindex|role)="[^"]*"', "", html)
    return html.replace("<button>Copy</button>", "")


def code(text, language=""):
    bar = f"<div><span>{language}</span></div>"
    return f'<div class="code">{bar}<pre><code>{text}</code></pre></div>'


CASES = {
    # blocks
    "": "",
    "one\ntwo": "<p>one<br>two</p>",
    "one\n\n\ntwo": "<p>one</p><p>two</p>",
    "# A *b* #": "<h3>A <em>b</em></h3>",
    "## C#": "<h4>C#</h4>",
    "###### deep": "<h6>deep</h6>",
    "#hash": "<p>#hash</p>",
    "a\n---\nb": "<p>a</p><hr><p>b</p>",
    "* * *": "<hr>",
    "> a\n> > b\n\nc": (
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"
    ),
    # code
    "```py title\nif a < b:\n\tc\n```\nd": code("if a &lt; b:\n\tc", "py") + "<p>d</p>",
    "````\n```\n````": code("```"),
    "~~~\n# no\n": code("# no\n"),
    "```\nnever closed": code("never closed"),
    "- a\n  ```\n    b\n  ```": f"<ul><li><p>a</p>{code('  b')}</li></ul>",
    # lists
    "- a\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "- a\n  - b\n    1. c\n- d": (
        '<ul><li><p>a</p><ul><li><p>b</p><ol start="1"><li><p>c</p></li></ol></li></ul></li>'
        "<li><p>d</p></li></ul>"
    ),
    "3. a\n\n   b\n\n4. c": '<ol start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>',
    "1. a\n- b": '<ol start="1"><li><p>a</p></li></ol><ul><li><p>b</p></li></ul>',
    "- a\nmore": "<ul><li><p>a<br>more</p></li></ul>",
    "- a\n\nb": "<ul><li><p>a</p></li></ul><p>b</p>",
    "born in\n1987. It": "<p>born in<br>1987. It</p>",
    "-1 and -2": "<p>-1 and -2</p>",
    # tables
    "| a | b |\n|:-:|--:|\n| `1` | 2 | 3 |\n| x": (
        '<div class="table"><table><thead>'
        '<tr><th class="center">a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td class="center"><code>1</code></td><td class="right">2</td></tr>'
        '<tr><td class="center">x</td></tr></tbody></table></div>'
    ),
    "a | b\n--|--\n1 \\| 2 | 3\n\nc": (
        '<div class="table"><table><thead>'
        "<tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1 | 2</td><td>3</td></tr></tbody></table></div><p>c</p>"
    ),
    "a | b": "<p>a | b</p>",
    "a | b\n---": "<p>a | b</p><hr>",
    # emphasis
    "**a** *b* ***c*** _d_ __e__ ~~f~~": (
        "<p><strong>a</strong> <em>b</em> <em><strong>c</strong></em> <em>d</em> "
        "<strong>e</strong> <del>f</del></p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "**中文。**后": "<p><strong>中文。</strong>后</p>",
    "2 * 3 * 4, 2**3": "<p>2 * 3 * 4, 2**3</p>",
    "snake_case_name": "<p>snake_case_name</p>",
    "**never closed": "<p>**never closed</p>",
    "\\*a\\* \\n": "<p>*a* \\n</p>",
    # code in a line, and the calculator's calls
    "`a*b*c` ``d ` e``": "<p><code>a*b*c</code> <code>d ` e</code></p>",
    "`never closed": "<p>`never closed</p>",
    "`12 * 7` → 84\nIt is 84.": (
        '<p><span class="call"><code>12 * 7</code> → <b>84</b></span><br>It is 84.</p>'
    ),
    # a quote of the user's own text
    "Sow in May.\n(source: garden.md, Beans)\nYes.": (
        "<blockquote><p>Sow in May.</p><cite>(source: garden.md, Beans)</cite></blockquote>"
        "<p>Yes.</p>"
    ),
    "- Sow in May.\n(source: garden.md)": (
        "<ul><li><p>Sow in May.</p></li></ul><cite>(source: garden.md)</cite>"
    ),
    # links
    '[a *b*](http://c.d/e_(f) "g")': '<p><a href="http://c.d/e_(f)">a <em>b</em></a></p>',
    "see (https://a.b/c_(d)).": (
        '<p>see (<a href="https://a.b/c_(d)">https://a.b/c_(d)</a>).</p>'
    ),
    "<https://a.b>": '<p><a href="https://a.b">https://a.b</a></p>',
    "[https://a.b](https://c.d)": '<p><a href="https://c.d">https://a.b</a></p>',
    "[1] and a[i](x": "<p>[1] and a[i](x</p>",
    # what is not the web, and what is HTML, stays text
    "[a](javascript:alert(1))": "<p><span>[a](javascript:alert(1))</span></p>",
    "[a](data:text/html,b)": "<p><span>[a](data:text/html,b)</span></p>",
    "[a](/v1/models)": "<p><span>[a](/v1/models)</span></p>",
    "![x](http://evil/)": '<p><a href="http://evil/">x</a></p>',
    "![x](data:image/png,y)": "<p><span>![x](data:image/png,y)</span></p>",
    "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    "&lt;": "<p>&amp;lt;</p>",
}


@pytest.mark.parametrize("text", CASES)
def test_a_text_becomes_these_elements(page, text):
    assert render(page, text) == CASES[text]


def test_a_link_opens_elsewhere_and_says_where(page):
    html = page.evaluate(RENDER, "[a](https://b.c)")
    assert 'target="_blank" rel="noopener noreferrer nofollow" title="https://b.c"' in html


ANSWER = """\
# A **short** title

Some *words*, `code_with_*`, and a [link](https://a.b/c) to ~~nothing~~ something.
`12 * 7` → 84
So it is **84**, or __so__.

- one
- two **bold**
  1. nested
  2. *again*

```python
# not a heading
print("* _ `")
```

| name | cost |
|:--|--:|
| `a` | 1 |
| b | **2** |

> quoted _text_
> and more

---

3.5 is the end."""


def test_what_is_shown_of_a_growing_answer_only_ever_grows(page):
    shown, growing, whole = page.evaluate(GROW, ANSWER)
    assert all(later.startswith(earlier) for earlier, later in zip(shown, shown[1:]))
    assert len(shown[-1]) > 150
    assert growing == whole


def random_texts(number):
    """Texts of all marks in any order, as nobody would write them; the same in every run."""
    marks = "* ** _ ~~ ` `` ``` - > # | |-| [ ] ]( ) < ! --- 1. a é 🙂 http://a.b".split()
    marks += ["\\", "\n", "\n\n", "  ", "\t", " → ", "(source: a)"]
    chance = random.Random(1)
    return ["".join(chance.choices(marks, k=chance.randint(2, 25))) for _ in range(number)]


def test_an_answer_that_grew_is_the_same_as_a_whole_one(page):
    for text in [*CASES, *random_texts(300)]:
        _, growing, whole = page.evaluate(GROW, text)
        assert growing == whole, text


def test_what_a_reader_selects_stays_selected_while_the_answer_grows(page):
    selected = page.evaluate("""() => {
      const element = document.body.appendChild(document.createElement("div"));
      const view = new MarkdownView(element);
      view.update("a\\n\\n- b\\n\\n```\\nfirst", true);
      const text = element.querySelector("pre code").firstChild;
      getSelection().setBaseAndExtent(text, 0, text, 5);
      view.update("a\\n\\n- b\\n\\n```\\nfirst\\nsecond\\n```\\nend", true);
      const selected = [getSelection().toString(), element.querySelector("pre").textContent];
      element.remove();
      return selected;
    }""")
    assert selected == ["first", "first\nsecond"]


LONG = {
    "backticks": "`" * MEGABYTE,
    "backticks apart": "` " * (MEGABYTE // 2),
    "runs of all lengths": " ".join("`" * length for length in range(1400)),
    "stars": "*" * MEGABYTE,
    "stars that open": "*a " * (MEGABYTE // 3),
    "stars that close": "a* " * (MEGABYTE // 3),
    "stars that do both": "a*" * (MEGABYTE // 2),
    "marks mixed": "*a_b~~" * (MEGABYTE // 6),
    "brackets": "[" * MEGABYTE,
    "links begun": "[](" * (MEGABYTE // 3) + " x",
    "titles begun": '[](a "' * (MEGABYTE // 6),
    "angles begun": "[](<" * (MEGABYTE // 4),
    "spaces in a link": "[a](" + " " * MEGABYTE,
    "addresses": "http://" * (MEGABYTE // 7),
    "points behind an address": "https://a" + "." * MEGABYTE,
    "pipes": "|" * MEGABYTE,
    "dashes of no table": "|\n" + "-" * MEGABYTE + "x",
    "rows of one cell": "|" * 60 + "\n" + "|-" * 59 + "|\n" + "|\n" * (MEGABYTE // 2),
    "list in list": "\n".join(" " * (2 * depth) + "- a" for depth in range(1000)),
    "markers in a line": "- " * (MEGABYTE // 2) + "a",
    "items": "- a\n" * (MEGABYTE // 4),
    "items far apart": "- a" + "\n" * MEGABYTE + "b",
    "quotes in quotes": ">" * MEGABYTE,
    "spaces": " " * MEGABYTE + "x",
    "hashes in a heading": "# " * (MEGABYTE // 2) + "x",
    "fences": "```\n" * (MEGABYTE // 4),
    "short lines": "a\n" * (MEGABYTE // 2),
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_takes_linear_time(page, name):
    assert page.evaluate(TIME, [LONG[name], False]) < HANGS_MS
    assert page.evaluate(TIME, [LONG[name], True]) < HANGS_MS


def test_what_is_beyond_the_limit_is_text(page):
    limit = page.evaluate("MAX_MARKDOWN")
    text = "*a*" + " " * (limit - 3) + "*b*"
    assert page.evaluate(RENDER, text) == '<p><em>a</em></p><div class="plain">*b*</div>'
