"""The figures of an analysis as tables: in a terminal of any width, and as HTML in a notebook."""

import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import takewhile
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sarac.figures import Row, condition_text, key, kinds, remarks, shape_text, span
from sarac.ir.graph import starred

_WIDE = 10_000
_STYLE = (
    "<style>.sarac{overflow:auto;max-height:40em}.sarac table{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    ".sarac th,.sarac td{padding:.15em .6em;text-align:right;border:0;border-bottom:1px solid #8884;color:inherit}"
    ".sarac th:first-child,.sarac td:first-child{text-align:left}.sarac tr{background:none!important}"
    ".sarac caption{text-align:left;font-weight:bold;color:inherit}.sarac .total{font-weight:bold}</style>"
)


class Column(NamedTuple):
    """A column of the table: its heading, what it shows of a row, and its heading in a narrow table; "" where it is left out."""

    heading: str
    cell: Callable[[Row], str]
    narrow: str
    total: bool = False


def columns(threshold: float, shares: Sequence[str], by_site: bool) -> Iterator[Column]:
    """The columns behind the name, in their order."""
    if not by_site:
        yield Column("sites", lambda row: str(row["sites"]), "sites", total=True)
    yield Column("(out, in)", lambda row: shape_text(row["shape"]), "shape")
    yield Column("form", lambda row: row["form"], "")
    for share in shares:
        yield Column(f"k at\n{share}", lambda row, share=share: span(row, share), f"k at\n{share}")  # type: ignore[misc]
    yield Column(f"k / n\nat {key(threshold)}", lambda row: f"{row['share']:.2f}", "k/n")
    yield Column("decay", lambda row: f"{row['decay']:.2f}", "decay")
    yield Column("condi-\ntion", lambda row: condition_text(row["condition"]), "cond")
    yield Column(f"trainable\nat {key(threshold)}", lambda row: f"{row['trainable']:,}", "trains", total=True)
    yield Column("parameters", lambda row: f"{row['parameters']:,}", "", total=True)


def totals(rows: Sequence[Row]) -> Row:
    """The last row: what all weights have together."""
    sums = {name: sum(row[name] for row in rows) for name in ("trainable", "parameters")}
    return {"weight": "all", "sites": len(rows), **sums}


def table(title: str, threshold: float, rows: Sequence[Row], by_site: bool, width: int) -> Table:
    """A table that is at most `width` wide where that can be: first the frame goes, then what is equal in all names."""
    groups, shares = kinds(rows, by_site), list(rows[0]["ranks"]) if rows else [key(threshold)]
    every = list(columns(threshold, shares, by_site))
    few = [column._replace(heading=column.narrow) for column in every if column.narrow]
    head, tail = _equal([group["weight"] for group in groups])
    drafts = [
        (Table(), every, ("", "")),
        (_bare(), every, ("", "")),
        (_bare(), few, ("", "")),
        (_bare(), few, (head, tail)),
    ]
    for made, chosen, equal in drafts:
        _fill(made, chosen, groups, rows, equal)
        if _natural(made) <= width:
            break
    words = f"{title}: {len(rows)} linear sites"
    words += f", threshold {key(threshold)}" if chosen is few else ""
    made.title = Text(words + (f", named {'…'.join(equal)}" if any(equal) else ""))
    made.caption, made.title_justify, made.caption_justify = Text("\n".join(remarks(rows))), "left", "left"
    return made


def left_out_table(left_out: Mapping[str, str], by_site: bool) -> Table:
    """What is left out and why, by kind of weight, or with `by_site` one row a weight."""
    made = Table(title="Parameters of two or more dimensions that are left out", title_justify="left")
    made.add_column("parameter", no_wrap=True)
    made.add_column("how many", justify="right")
    made.add_column("why")
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for name, reason in left_out.items():
        groups[name if by_site else starred(name), reason] += 1
    for (kind, reason), count in groups.items():
        made.add_row(Text(kind), str(count), Text(reason))
    return made


def html(title: str, threshold: float, rows: Sequence[Row], left_out: int) -> str:
    """The table by kind as HTML for a notebook, in its colours, light or dark."""
    every = list(columns(threshold, list(rows[0]["ranks"]) if rows else [key(threshold)], by_site=False))

    def line(cells: Sequence[str], tag: str = "td", kind: str = "") -> str:
        return f"<tr{kind}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = [line([group["weight"], *(column.cell(group) for column in every)]) for group in kinds(rows)]
    total = totals(rows)
    body.append(line(["all", *(column.cell(total) if column.total else "" for column in every)], kind=' class="total"'))
    heads = line(["weight", *(column.heading.replace("-\n", "").replace("\n", " ") for column in every)], "th")
    caption = escape(f"{title}: {len(rows)} linear sites, threshold {key(threshold)}; {left_out} parameters left out")
    notes = "".join(f"<p>{escape(remark)}</p>" for remark in remarks(rows))
    return (
        f'<div class="sarac">{_STYLE}<table><caption>{caption}</caption><thead>{heads}</thead>'
        f"<tbody>{''.join(body)}</tbody></table>{notes}</div>"
    )


def as_text(made: Table, width: int = 130) -> str:
    """A rich table as plain text."""
    file = io.StringIO()
    Console(file=file, width=width).print(made)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())


def _fill(made: Table, chosen: Sequence[Column], groups: Sequence[Row], rows: Sequence[Row], equal: tuple[str, str]) -> None:
    made.add_column("weight", overflow="fold")
    for column in chosen:
        heading = column.heading.replace("-\n", "") if made.show_edge else column.heading
        made.add_column(heading, justify="left" if heading == "form" else "right", no_wrap=True)
    for group in groups:
        name = group["weight"].removeprefix(equal[0]).removesuffix(equal[1]) or group["weight"]
        made.add_row(Text(name), *(_cell(column, group) for column in chosen))
    made.add_section()
    total = totals(rows)
    made.add_row("all", *(column.cell(total) if column.total else "" for column in chosen))


def _cell(column: Column, group: Row) -> str:
    return column.cell(group).replace(" x ", "x") if column.heading == "shape" else column.cell(group)


def _bare() -> Table:
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)


def _natural(made: Table) -> int:
    console = Console(width=_WIDE)
    return Measurement.get(console, console.options, made).maximum


def _equal(names: Sequence[str]) -> tuple[str, str]:
    """What all names begin and end with, whole parts between dots."""
    if len(names) < 2:
        return "", ""
    head = _same(names)
    tail = _same([name[::-1] for name in names])[::-1]
    return head[: head.rfind(".") + 1], tail[tail.find(".") :] if "." in tail else ""


def _same(words: Sequence[str]) -> str:
    """The letters that all words begin with."""
    return "".join(first for first, *_ in takewhile(lambda each: len(set(each)) == 1, zip(*words, strict=False)))
