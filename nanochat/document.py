"""A document as a list of blocks, written as Markdown and as one self-contained HTML page.

Blocks are tuples whose first item is the kind. MARKDOWN and HTML, two tables, hold a function for
each kind that draws it.

    ("heading", text)
    ("text", text)
    ("table", header, rows)
    ("picture", file name, what it shows)
    ("tiles", [(label, value), ...])
    ("samples", prompt, [(when, continuation), ...])
"""
import base64
import functools
import html
import re

# --------------------------------------------------------------------------------------------------
# the blocks as Markdown

def _escape_markdown(text):
    return re.sub(r"([\\`*<|\[])", r"\\\1", str(text)).replace("\n", " ")


def _markdown_table(header, rows):
    lines = [header, ["---"] * len(header)]
    for row in rows:
        lines.append([_escape_markdown(cell) for cell in row])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_samples(prompt, texts):
    """Indented code: no markup that a model writes has an effect inside it."""
    parts = [f"**{_escape_markdown(prompt)}**"]
    for when, text in texts:
        parts.append(f"{when}:")
        parts.append("\n".join("    " + line for line in text.split("\n")))
    return "\n\n".join(parts)


MARKDOWN = {
    "heading": lambda text: f"## {text}",
    "text": _escape_markdown,
    "table": _markdown_table,
    "picture": lambda name, alt: f"![{alt}]({name})",
    "tiles": lambda tiles: _markdown_table(["", ""], tiles),
    "samples": _markdown_samples,
}


def to_markdown(title, contents):
    """A Markdown document of a list of blocks."""
    parts = [f"# {title}"]
    for kind, *rest in contents:
        parts.append(MARKDOWN[kind](*rest))
    return "\n\n".join(parts) + "\n"


# --------------------------------------------------------------------------------------------------
# the blocks as HTML

CSS = """
:root { color-scheme: light; --ink: #20262e; --soft: #66707c; --line: #e3e7ec; --accent: #2b6cb0; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: var(--ink);
       font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 880px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0; letter-spacing: -.02em; }
.when { color: var(--soft); margin: 6px 0 24px; }
h2 { font-size: 19px; margin: 44px 0 12px; letter-spacing: -.01em; }
p { margin: 12px 0; max-width: 72ch; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; }
.tile, .table, figure, .sample { background: #fff; border: 1px solid var(--line);
                                 border-radius: 10px; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 22px; line-height: 1.3; letter-spacing: -.02em;
          white-space: nowrap; }
.tile span { color: var(--soft); font-size: 13px; }
.table { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
        font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 8px 16px; border-top: 1px solid var(--line);
         vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; white-space: nowrap; }
tr:first-child > * { border-top: 0; }
td:first-child { font-weight: 550; white-space: nowrap; }
figure { margin: 12px 0; padding: 14px; }
img { display: block; width: 100%; height: auto; }
.sample { padding: 14px 16px; margin: 12px 0; }
.sample b { font-weight: 600; }
.sample dl { margin: 8px 0 0; display: grid; grid-template-columns: 150px 1fr; gap: 6px 16px; }
dt { color: var(--soft); font-size: 13px; }
dd { margin: 0; min-width: 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
     white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 560px) {
  main { padding: 24px 14px; }
  th, td { padding: 7px 10px; }
  .sample dl { grid-template-columns: 1fr; gap: 2px; }
  dd { margin-bottom: 8px; }
}
""".strip()


def _escape_html(text):
    return html.escape(str(text))


def _html_cells(tag, cells):
    """A line of a table; tag: th or td."""
    return "<tr>" + "".join(f"<{tag}>{_escape_html(cell)}</{tag}>" for cell in cells) + "</tr>"


def _html_table(header, rows):
    head = _html_cells("th", header) if any(header) else ""
    body = "".join(_html_cells("td", row) for row in rows)
    return f"<div class=table><table>{head}{body}</table></div>"


def _html_picture(folder, name, alt):
    data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{_escape_html(alt)}" src="{source}"></figure>'


def _html_tiles(tiles):
    parts = []
    for label, value in tiles:
        value, label = _escape_html(value), _escape_html(label)
        parts.append(f"<div class=tile><b>{value}</b><span>{label}</span></div>")
    return f"<div class=tiles>{''.join(parts)}</div>"


def _html_samples(prompt, texts):
    parts = []
    for when, text in texts:
        parts.append(f"<dt>{_escape_html(when)}</dt><dd>{_escape_html(text)}</dd>")
    return f"<div class=sample><b>{_escape_html(prompt)}</b><dl>{''.join(parts)}</dl></div>"


HTML = {
    "heading": lambda text: f"<h2>{_escape_html(text)}</h2>",
    "text": lambda text: f"<p>{_escape_html(text)}</p>",
    "table": _html_table,
    "picture": _html_picture,  # takes the folder of the pictures first
    "tiles": _html_tiles,
    "samples": _html_samples,
}


def to_html(title, when, contents, folder):
    """One self-contained page of a list of blocks: the pictures, read from `folder`, are inside."""
    draw = {**HTML, "picture": functools.partial(_html_picture, folder)}
    body = "\n".join(draw[kind](*rest) for kind, *rest in contents)
    title, when = _escape_html(title), _escape_html(when)
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>\n{CSS}\n</style></head>\n"
            f"<body><main><h1>{title}</h1><p class=when>{when}</p>\n"
            f"{body}\n</main></body></html>\n")
