"""HTML by construction: every string is escaped unless this package built it as markup.

Model texts and prompts are untrusted. They reach the page only through `el` and `text_block`.
"""

import html
import re
import unicodedata

SHOWN_CHARACTERS = 1200  # of one model text
_VOID = {"meta", "br"}
_KEPT_CONTROLS = "\n\t"


class Html(str):
    """Markup that is already safe to put on the page."""


def visible(text) -> str:
    """Text with controls, bidirectional overrides and lone surrogates spelled out, so that nothing hides."""

    def spell(character: str) -> str:
        if character in _KEPT_CONTROLS or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
            return character
        return character if character == "\u200d" else f"⟨U+{ord(character):04X}⟩"

    return "".join(map(spell, str(text)))


def escape(child) -> Html:
    """A child as markup: Html is kept, a list is joined, None is nothing, anything else is escaped."""
    if child is None:
        return Html("")
    if isinstance(child, Html):
        return child
    if isinstance(child, list | tuple):
        return Html("".join(escape(part) for part in child))
    return Html(html.escape(visible(child), quote=True))


def el(tag: str, *children, **attributes) -> Html:
    """An element; attribute `class_` is class, `http_equiv` is http-equiv, True is bare, None is left out."""
    parts = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(name)
        elif value is not None and value is not False:
            parts.append(f'{name}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if tag in _VOID else f"{opening}{escape(children)}</{tag}>")


def paragraph(*children) -> Html:
    return el("p", *children)


def missing(what: str) -> Html:
    """The plain statement that something is not there."""
    return el("p", what, class_="missing")


def text_block(text, limit: int = SHOWN_CHARACTERS) -> Html:
    """A model text or a prompt, white space kept; cut for display at `limit` characters, with a note."""
    if text is None or text == "":
        return el("div", el("em", "(empty)"), class_="text")
    text = str(text)
    if not text.strip():
        return el("div", el("em", f"(only white space, {len(text)} characters)"), class_="text")
    note = (
        el("em", f" … cut for display: {limit:,} of {len(text):,} characters") if len(text) > limit else None
    )
    return el("div", re.sub(r"\r\n", "\n", text[:limit]), note, class_="text")


def badge(text, kind: str = "") -> Html:
    return el("span", text, class_=f"badge {kind}".strip())


def table(headers: list, rows: list[list], numeric_from: int = 1, class_: str = "") -> Html:
    """A table that scrolls in its own box on a narrow page; columns from `numeric_from` on align right."""

    def cell(tag: str, column: int, content):
        return el(tag, content, class_="number" if column >= numeric_from else None)

    head = el("tr", [cell("th", i, header) for i, header in enumerate(headers)])
    body = [el("tr", [cell("td", i, content) for i, content in enumerate(row)]) for row in rows]
    return el(
        "div", el("table", el("thead", head), el("tbody", body), class_=class_ or None), class_="scroll"
    )


def facts(pairs: list[tuple]) -> Html:
    """Names and values side by side; a value of None shows as a dash."""
    return el(
        "dl",
        [el("div", el("dt", name), el("dd", "–" if value is None else value)) for name, value in pairs],
        class_="facts",
    )


def bar_list(items: list[tuple]) -> Html:
    """Horizontal bars with long labels: [(label, count)]. Plain HTML, so labels wrap on a narrow page."""
    most = max([count for _, count in items], default=0) or 1
    return el(
        "div",
        [
            el(
                "div",
                el("span", label, class_="label"),
                el(
                    "span",
                    el("span", class_="fill", style=f"width:{100 * count / most:.1f}%"),
                    class_="track",
                ),
                el("span", f"{count:,}", class_="count"),
                class_="bar",
            )
            for label, count in items
        ],
        class_="bars",
    )


def details(summary, *children, open_: bool = False, class_: str = "plain") -> Html:
    return el("details", el("summary", summary), *children, open=open_ or None, class_=class_)


def section(anchor: str, title: str, *children) -> Html:
    return el("section", el("h2", title), *children, id=anchor)
