"""A page as a reader takes it: its text, tables, headings and scripts, checked for being well formed on the way."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Raises if a tag is closed that was not opened last, or a part stands where HTML has no place for it."""

    VOID = ("meta", "br", "link", "img", "input", "hr")
    BLOCKS = (
        "div",
        "p",
        "table",
        "ul",
        "ol",
        "dl",
        "pre",
        "details",
        "section",
        "figure",
        "h1",
        "h2",
        "h3",
        "h4",
        "article",
    )
    PHRASES = ("p", "h1", "h2", "h3", "h4", "span", "bdi", "b", "a", "button", "label", "summary", "caption")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.scripts = "", 0
        self.fetched, self.linked, self.ids, self.headings = [], [], [], []
        self.tables: list[list[list[str]]] = []
        self.captions: list[str] = []
        self.scopes: list[str | None] = []
        self.handlers, self.labels = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs), f"<{tag}> says an attribute twice"
        self.scripts += tag == "script" and values.get("type") != "application/json"
        self.handlers += [name for name in values if name.startswith("on")]
        self.fetched += [values[name] for name in ("src", "data", "action") if name in values]
        if "href" in values:
            (self.linked if values["href"].startswith("#") else self.fetched).append(values["href"])
        self.ids += [values["id"]] if "id" in values else []
        self.labels += [values["aria-label"]] if values.get("role") == "img" else []
        if tag in self.BLOCKS:
            assert not {"p", "h1", "h2", "h3", "h4", "span", "bdi"} & set(self.open[-1:]), (
                f"<{tag}> in <{self.open[-1]}>"
            )
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.scopes += [values.get("scope")] if tag == "th" else []
        if tag == "caption":
            self.captions.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes what it did not open"

    def handle_data(self, data):
        if {"script", "style"} & set(self.open):
            return
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "caption":
            self.captions[-1] += data
        for tag in self.open:
            if tag in ("h1", "h2", "h3", "h4"):
                level, text = self.headings[-1]
                self.headings[-1] = (level, text + data)
