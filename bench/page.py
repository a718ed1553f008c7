"""The page around the report: one HTML file, complete in itself, for light and dark, wide and narrow."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Colours that differ for every kind of colour vision (after Okabe and Ito), lighter ones for the dark page.
STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --text: #1d1f23; --quiet: #5a616d; --rule: #d9dce2; --mark: #b3261e;
  --s0: #0067a5; --s1: #c24e00; --s2: #00795a; --s3: #9c4f80; --s4: #8a6d00; --s5: #4a4f5a; --note: #fff3d6; }
@media (prefers-color-scheme: dark) { :root { --page: #15171b; --text: #e7e8eb; --quiet: #a6acb7; --rule: #363b44;
  --mark: #ff9b91; --s0: #6cb6f0; --s1: #f59a5b; --s2: #5fcfa8; --s3: #e4a0cc; --s4: #e6c75a; --s5: #b6bcc8;
  --note: #3a3118; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 58rem; padding: 1.25rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 2px solid var(--rule); }
h3 { font-size: 1.08rem; margin: 2rem 0 .4rem; }
p { margin: .5rem 0; } .quiet, figcaption, .command { color: var(--quiet); font-size: .9rem; }
.note { background: var(--note); padding: .5rem .75rem; border-radius: 4px; font-weight: 600; }
figure { margin: .75rem 0; max-width: 44rem; }
nav a { margin-right: .9rem; white-space: nowrap; } a { color: var(--s0); }
code { font-size: .88em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .55rem; text-align: right; border-bottom: 1px solid var(--rule); vertical-align: top; }
tbody th, thead th:first-child { text-align: left; font-weight: 400; position: sticky; left: 0; background: var(--page);
  min-width: 8rem; }
thead th { font-weight: 600; } .mark { color: var(--mark); font-weight: 600; } .mark::before { content: "\\25bc "; }
td { white-space: nowrap; } .texts td { text-align: left; white-space: normal; min-width: 4rem; }
.texts thead th { text-align: left; }
.heat td, .heat thead th, .heat tbody th { text-align: center; min-width: 3.3rem; border: 2px solid var(--page);
  white-space: nowrap; padding: .25rem .3rem; }
.heat td { color: var(--text); background: color-mix(in srgb, var(--hue) var(--share), var(--page)); }
svg.chart { display: block; width: 100%; height: auto; }
svg.chart text { font: 14px system-ui, sans-serif; fill: var(--quiet); } svg.chart .name { fill: var(--text); }
.grid { stroke: var(--rule); } .level, .axis { stroke: var(--text); stroke-dasharray: 6 4; } .axis { stroke-dasharray: none; }
polyline { fill: none; stroke-width: 2.5; } .cross { fill: none; stroke-width: 2.5; }
.s0 { fill: var(--s0); stroke: var(--s0); } .s1 { fill: var(--s1); stroke: var(--s1); }
.s2 { fill: var(--s2); stroke: var(--s2); } .s3 { fill: var(--s3); stroke: var(--s3); }
.s4 { fill: var(--s4); stroke: var(--s4); } .s5 { fill: var(--s5); stroke: var(--s5); }
.s1 polyline { stroke-dasharray: 8 4; } .s2 polyline { stroke-dasharray: 2 4; } .s3 polyline { stroke-dasharray: 10 4 2 4; }
.s4 polyline { stroke-dasharray: 4 3; } .s5 polyline { stroke-dasharray: 14 5; }
.keys { margin: .2rem 0; } .key { margin-right: 1.1rem; white-space: nowrap; font-size: .9rem; }
.key svg { width: 36px; height: 16px; vertical-align: middle; margin-right: .35rem; }
.sides { display: flex; color: var(--quiet); font-size: .85rem; } .sides span { width: 50%; padding: 0 .4rem; }
.sides span:first-child { text-align: right; }
.bar { margin: .45rem 0; font-size: .88rem; line-height: 1.3; } .track { position: relative; height: 1.15rem; }
.track::before { content: ""; position: absolute; left: 50%; top: -.1rem; bottom: -.1rem;
  border-left: 1.5px solid var(--text); }
.track i { position: absolute; top: .1rem; height: .95rem; border-radius: 2px; }
.track b { position: absolute; font-weight: 400; padding: 0 .4rem; color: var(--quiet); }
.ahead { background: var(--s0); }
.behind { background: repeating-linear-gradient(45deg, var(--s1) 0 4px, var(--page) 4px 6px); border: 1px solid var(--s1); }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--quiet); }
@media (max-width: 34rem) { svg.chart text { font-size: 22px; } h1 { font-size: 1.3rem; } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page. command: what reproduces it."""

    id: str
    title: str
    body: str
    command: str = ""

    def html(self) -> str:
        command = f'<p class="command">To reproduce: <code>{escape(self.command)}</code></p>' if self.command else ""
        return f'<section id="{escape(self.id)}"><h3>{escape(self.title)}</h3>{self.body}{command}</section>'


@dataclass(frozen=True)
class Part:
    """All sections of one device."""

    id: str
    title: str
    note: str
    sections: Sequence[Section]

    def html(self) -> str:
        note = f'<p class="note">{escape(self.note)}</p>' if self.note else ""
        return f'<h2 id="{escape(self.id)}">{escape(self.title)}</h2>{note}' + "".join(s.html() for s in self.sections)


def html(title: str, lead: str, parts: Sequence[Part]) -> str:
    """The whole page."""
    links = []
    for part in parts:
        links += [f'<a href="#{escape(s.id)}">{escape(s.title)}</a>' for s in part.sections]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{lead}<nav>{' '.join(links)}</nav>\n"
        + "\n".join(part.html() for part in parts)
        + "\n</body></html>\n"
    )


def paragraph(text: str, style: str = "") -> str:
    return f"<p{f' class={style}' if style else ''}>{escape(text)}</p>"


def figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
