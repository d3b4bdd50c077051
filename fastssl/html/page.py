"""The frame of a self-contained HTML page: elements that escape what they are given, style, sections, tables.

Nothing is loaded from anywhere and no script runs: the page opens from a disk without a network, in light and dark, on
a phone and on paper. Text reaches the page through `element`, which escapes whatever is not `Html` already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

MOST_ROWS = 24  # of a table behind a chart
NUM_COLOURS = 8  # --c0 to --c7


class Html(str):
    """Markup that is safe as it stands; what is added to it is escaped unless it is Html as well."""

    def __add__(self, other: str) -> Html:
        return joined((self, other))


def element(name: str, *children: object, **attributes: object) -> Html:
    """`<name attributes>children</name>`. Children: text, which is escaped, `Html`, and None, which is nothing.
    Attributes: `class_` is `class`, other underscores are hyphens; None and False are left out, True stands alone."""
    written = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            written += f" {key}" if value is True else f' {key}="{escape(str(value))}"'
    inner = joined(children)
    void = name in ("img", "br", "meta", "col")
    return Html(f"<{name}{written}>" if void else f"<{name}{written}>{inner}</{name}>")


def joined(children: Iterable[object]) -> Html:
    """One after the other, each escaped unless it is `Html`."""
    return Html("".join(c if isinstance(c, Html) else escape(str(c)) for c in children if c is not None))


def page(title: str, *body: object, contents: Mapping[str, str] | None = None) -> Html:
    """A whole document. `contents`: section titles by id, for the links at its head."""
    links = [element("a", text, href=f"#{name}") for name, text in (contents or {}).items()]
    head = joined([
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'),
        element("title", title),
        element("style", Html(STYLE)),
    ])  # fmt: skip
    shown = element("main", element("nav", *links) if links else None, *body)
    return Html(f"<!doctype html>\n<html lang=en><head>{head}</head>\n<body>{shown}</body></html>\n")


def section(name: str, title: str, *body: object) -> Html:
    return Html("\n") + element("section", element("h2", title), *body, id=name)


def paragraph(*text: object, quiet: bool = False) -> Html:
    return element("p", *text, class_="quiet" if quiet else None)


def facts(rows: Mapping[str, object]) -> Html:
    """Names and what they are, one a line."""
    return element("dl", *(part for k, v in rows.items() for part in (element("dt", k), element("dd", v))))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """All rows; numbers are written by `number` and stand to the right."""
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = element("tr", *(element("th", c, class_="num" if r else None) for c, r in zip(columns, right, strict=True)))
    body = [
        element("tr", *(element("td", _cell(value), class_="num" if _is_number(value) else None) for value in row))
        for row in rows
    ]
    return element("div", element("table", element("thead", head), element("tbody", *body)), class_="scroll")


def numbers_behind(columns: Sequence[str], rows: Sequence[Sequence[object]], what: str = "The numbers") -> Html:
    """A table that opens at a click: at most MOST_ROWS rows, evenly spaced, the first and the last among them."""
    if not rows:
        return Html()
    shown = min(len(rows), MOST_ROWS)
    chosen = sorted({round(i * (len(rows) - 1) / max(1, shown - 1)) for i in range(shown)})
    label = what if len(chosen) == len(rows) else f"{what}: {len(chosen)} of {len(rows):,} rows"
    return element("details", element("summary", label), table(columns, [rows[i] for i in chosen]))


def number(value: float | None) -> str:
    """Whole numbers with separators, others to four digits; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return str(value)
    if abs(value) >= 10_000:
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:.4g}"
    if "e" in text:
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa} · 10^{int(exponent)}"
    return text.replace("-", "−")


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object) -> object:
    return number(value) if value is None or isinstance(value, int | float) else value


# Okabe and Ito's colours, told apart with any colour vision; darker on paper white, lighter on black, until each
# stands out by 3:1. Charts never rely on them alone: lines are also dashed, points shaped, groups named.
_LIGHT = """--paper:#fdfcf9;--ink:#22201c;--quiet:#69645b;--rule:#dcd8ce;--faint:#f3f0e8;
--c0:#0068a8;--c1:#c65300;--c2:#00855f;--c3:#b0568f;--c4:#a97400;--c5:#2f8fc4;--c6:#77736b;--c7:#7a3ea0;"""
_DARK = """--paper:#171614;--ink:#e9e5dc;--quiet:#a39d91;--rule:#3a3732;--faint:#211f1c;
--c0:#5cb3ee;--c1:#ff9450;--c2:#35c79b;--c3:#eb9fcd;--c4:#f2b93b;--c5:#a5d8f7;--c6:#b5b0a6;--c7:#c99cf0;"""

STYLE = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0;background:var(--paper);color:var(--ink);
 font:17px/1.5 Charter,"Bitstream Charter","Iowan Old Style","Palatino Linotype",Palatino,Georgia,serif}}
main{{max-width:62rem;margin:0 auto;padding:2.5rem 1.25rem 5rem}}
h1{{font-weight:400;font-size:2.1rem;line-height:1.15;margin:0 0 .3rem;overflow-wrap:anywhere}}
h2{{font-weight:400;font-size:1.4rem;line-height:1.2;margin:0 0 .6rem}}
h3{{font-weight:600;font-size:1rem;margin:1.4rem 0 .3rem}}
section{{margin-top:2.6rem;padding-top:1.4rem;border-top:1px solid var(--rule)}}
p{{max-width:44rem;margin:.4rem 0 .8rem}}
a{{color:inherit;text-decoration-color:var(--quiet);text-underline-offset:.2em}}
.quiet{{color:var(--quiet)}}
nav,.key,table,dl,summary,svg text,code{{
 font-family:ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
nav{{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.8rem;margin-bottom:2.2rem;color:var(--quiet)}}
code{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:.82em;overflow-wrap:anywhere}}
.figures{{display:flex;flex-wrap:wrap;gap:1.2rem 3rem;margin:1.4rem 0}}
.figures b{{display:block;font-weight:400;font-size:2.9rem;line-height:1.1;font-variant-numeric:lining-nums}}
.figures div{{max-width:21rem;font-size:.9rem;line-height:1.4}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.2rem;font-size:.84rem;margin:1rem 0}}
dt{{color:var(--quiet)}} dd{{margin:0;overflow-wrap:anywhere;min-width:0}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;font-size:.8rem;line-height:1.35;font-variant-numeric:tabular-nums lining-nums}}
th{{text-align:left;font-weight:600;vertical-align:bottom;color:var(--quiet)}}
th,td{{padding:.22rem .9rem .22rem 0;white-space:nowrap}}
thead th{{border-bottom:1px solid var(--rule)}} tbody tr+tr td{{border-top:1px solid var(--faint)}}
.num{{text-align:right}}
details{{margin:.5rem 0 1rem}} summary{{cursor:pointer;font-size:.8rem;color:var(--quiet);margin-bottom:.4rem}}
.charts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18rem),1fr));gap:1.6rem 1.8rem;
 margin:1rem 0;align-items:end}}
figure{{margin:0;min-width:0;break-inside:avoid}} figure.wide{{margin:1rem 0}}
figcaption{{font-size:.92rem;line-height:1.35;margin-bottom:.65rem}}
.key{{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.76rem;color:var(--quiet);margin:-.35rem 0 .7rem}}
.key span{{display:inline-flex;align-items:center;gap:.35rem}} .key svg{{flex:none}}
.chart{{display:grid;grid-template-columns:3.1rem minmax(0,1fr);height:var(--h,10.5rem);
 grid-template-rows:minmax(0,1fr) 1.6rem}}
figure.wide .chart{{--h:15rem}}
.chart svg{{width:100%;height:100%;overflow:visible;display:block}}
.chart .x{{grid-column:2}}
svg text{{font-size:11px;fill:var(--quiet);font-variant-numeric:tabular-nums lining-nums}}
.grid{{stroke:var(--rule);stroke-width:1}} .grid.zero{{stroke:var(--quiet)}}
.line{{fill:none;stroke-width:1.4;stroke-linejoin:round;vector-effect:non-scaling-stroke}}
.dashed{{stroke-dasharray:5 3}}
.mark{{stroke:var(--ink);stroke-width:1;stroke-dasharray:2 2}} text.mark-name{{fill:var(--ink)}}
.span{{fill:var(--c1);opacity:.22}}
.bars{{display:grid;grid-template-columns:fit-content(40%) minmax(3rem,1fr) max-content;gap:.2rem .7rem;
 align-items:center;font:.8rem/1.3 ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;
 font-variant-numeric:tabular-nums lining-nums}}
.bars>span{{overflow-wrap:anywhere}} .bars>span.num{{color:var(--quiet);text-align:right}}
.bars svg{{width:100%;height:.8rem;display:block}}
{"".join(f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}" for i in range(NUM_COLOURS))}
.hollow{{fill:none;stroke-width:1.3}}
.scatter{{width:100%;max-width:40rem;overflow:visible;display:block}}
.scatter text{{font-size:13px;font-weight:600;fill:var(--ink);text-anchor:middle;paint-order:stroke;
 stroke:var(--paper);stroke-width:4px;stroke-linejoin:round}}
.scatter circle,.scatter rect{{opacity:.72}}
.sheets{{display:flex;flex-wrap:wrap;gap:0 2.5rem}} .sheets>div{{min-width:0}}
.crops{{display:grid;gap:3px;justify-content:start;margin:.5rem 0}}
.crops img{{width:100%;display:block;aspect-ratio:1;border-radius:1px}} .pixels{{image-rendering:pixelated}}
.crops span{{font:.72rem/1.2 ui-sans-serif,system-ui,sans-serif;color:var(--quiet);align-self:end}}
.thumbs{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(45%,10rem),1fr));gap:1.4rem 1rem;
 margin:1.6rem 0;align-items:start}}
.thumbs img{{width:100%;aspect-ratio:1;object-fit:contain;display:block;background:var(--faint);border-radius:2px}}
.thumbs figcaption{{margin:.4rem 0 0;overflow-wrap:anywhere}} .thumbs span{{font-size:.8rem}}
.thumbs code{{display:block;color:var(--quiet);font-size:.72rem}}
.confusion td,.confusion th{{padding:0 .2rem;min-width:2rem;height:1.9rem;text-align:center;border:0}}
.confusion tbody th{{text-align:right;padding-right:.6rem;vertical-align:middle;font-weight:400}}
.confusion thead th{{border:0;font-weight:400}} .confusion thead td{{border:0!important}}
.confusion thead span{{writing-mode:vertical-rl;transform:rotate(180deg);max-height:8rem;display:inline-block}}
.confusion tbody td{{background:color-mix(in srgb,var(--c1) calc(var(--v,0)*1%),transparent);
 border:1px solid var(--faint)!important}}
.confusion td.right{{background:color-mix(in srgb,var(--c0) calc(var(--v,0)*1%),transparent)}}
@media (max-width:34rem){{
 body{{font-size:16px}} main{{padding-top:1.4rem}} h1{{font-size:1.6rem}} .figures b{{font-size:2.3rem}}
 dl{{grid-template-columns:1fr}} dd{{margin-bottom:.4rem}}
 .confusion td,.confusion th{{min-width:1.55rem;font-size:.66rem}}
}}
@media print{{
 *{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
 body{{font-size:10.5pt;background:none}} main{{max-width:none;padding:0}} nav,details:not([open]){{display:none}}
 h2,h3{{break-after:avoid}} tr,.confusion{{break-inside:avoid}}
}}
"""
