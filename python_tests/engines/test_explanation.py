"""What ``explain()`` returns: text, tables for a notebook, plain data."""

from __future__ import annotations

from html.parser import HTMLParser

from torch import nn

from l2rw_ext import Explanation, Reweighter
from support.models import CLASSES, cross_entropy, vectors


def _explanation() -> Explanation:
    model = nn.Sequential()
    model.add_module("<first>", nn.Linear(5, 8))
    model.add_module("last", nn.Linear(8, CLASSES))
    return Reweighter(model.double(), cross_entropy).explain(vectors(6), vectors(4))


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        self.rows[-1].append(data)


def test_a_notebook_shows_what_is_printed() -> None:
    explanation = _explanation()
    cells = _Cells()
    cells.feed(explanation._repr_html_())
    facts, layers = str(explanation).split("\n\n")
    assert [f"{word + ':':8}{said}" for word, said in cells.rows[: facts.count("\n") + 1]] == (
        facts.splitlines()
    )
    table = cells.rows[facts.count("\n") + 1 :]
    assert [row[0] for row in table] == [
        "parameters",
        "<first>.weight, <first>.bias",
        "last.weight, last.bias",
    ]
    assert [" ".join(row).split() for row in table] == [
        line.split() for line in layers.splitlines()
    ]


def test_plain_data() -> None:
    data = _explanation().as_dict()
    assert data["engine"] == "layerwise"
    assert [layer["form"] for layer in data["layers"]] == ["dense", "dense"]
    assert data["kept_bytes"] == sum(layer["kept_bytes"] for layer in data["layers"])
