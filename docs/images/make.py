"""Draw docs/images/launches.svg: what one program of the fused step owns, and how a sequence is one launch.

Run it: python docs/images/make.py
The colours are mid-tones, readable on a light and on a dark page; the background is transparent.
"""

from pathlib import Path

WIDTH, HEIGHT = 900, 510
INK = "#77818c"  # text and lines on the page
FAINT = "#98a2ad"
GATES = {"i": "#2f7ed8", "f": "#c2573a", "g": "#3c8f50", "o": "#8a63c6"}
STATE = "#b0791b"


def text(x, y, content, *, size=14, anchor="middle", fill=INK, weight="normal") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" font-weight="{weight}">'
        f"{content}</text>"
    )


def sub(index: str) -> str:
    return f'<tspan dy="4" font-size="10">{index}</tspan><tspan dy="-4">&#8203;</tspan>'


def box(x, y, w, h, *, fill="none", stroke=FAINT, rx=2, dash="") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{rx}" fill="{fill}" stroke="{stroke}"{dashed}/>'


def line(x1, y1, x2, y2, *, arrow=False, stroke=INK, width=1.2, dash="") -> str:
    end = ' marker-end="url(#head)"' if arrow else ""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{stroke}" stroke-width="{width}"{dashed}{end}/>'


def step() -> list[str]:
    """The upper half: rows of [x | h], columns of the weights, the tile, and the new state."""
    top, rows = 64, (104, 34)  # of the matrices; of the program's batch rows
    parts = [text(12, 22, "One timestep, one launch: what one program owns", size=16, anchor="start", weight="bold")]
    # [x_t | h_{t-1}]
    for x, w, name in ((30, 62, "x" + sub("t")), (92, 84, "h" + sub("t−1"))):
        parts += [box(x, top, w, 120), box(x, rows[0], w, rows[1], fill=INK), text(x + w / 2, top - 10, name)]
    parts += [text(18, top + 64, "B"), text(103, top + 140, "BLOCK_B rows", size=12)]
    parts += [text(198, top + 66, "×", size=20)]
    # The weights, columns by gate
    for k, (gate, colour) in enumerate(GATES.items()):
        x = 220 + 66 * k
        parts += [
            box(x, top, 60, 120),
            box(x + 22, top, 15, 120, fill=colour, stroke=colour),
            text(x + 30, top - 10, gate),
        ]
    parts += [text(349, top + 140, "BLOCK_H units of each gate, from W_ih and W_hh", size=12)]
    parts += [text(502, top + 66, "=", size=20)]
    # The tile
    parts += [box(524, rows[0] - 34, 240, 102, rx=8, dash="4 4"), text(644, rows[0] + 88, "in registers", size=12)]
    for k, (gate, colour) in enumerate(GATES.items()):
        x = 536 + 25 * k
        parts += [box(x, rows[0], 25, rows[1], fill=colour, stroke=colour, rx=0)]
        parts += [text(x + 12.5, rows[0] + 22, gate, fill="#ffffff", weight="bold")]
        parts += [text(x + 12.5, rows[0] - 10, "tanh" if gate == "g" else "σ", size=11)]
    parts += [text(586, rows[0] + 54, "one tile", size=12)]
    parts += [text(648, rows[0] + 13, f"c{sub('t')} = f c{sub('t−1')} + i g", anchor="start")]
    parts += [text(648, rows[0] + 35, f"h{sub('t')} = o tanh c{sub('t')}", anchor="start")]
    # The new state
    parts += [line(766, rows[0] + 17, 788, rows[0] + 17, arrow=True)]
    parts += [box(794, top, 84, 120), box(825, rows[0], 15, rows[1], fill=STATE, stroke=STATE)]
    parts += [text(836, top - 10, f"c{sub('t')}, h{sub('t')}"), text(836, top + 140, "[B, H]", size=12)]
    return parts


def sequence() -> list[str]:
    """The lower half: programs keep their slice of W_hh and exchange h once a step."""
    top, height, gap = 314, 30, 10
    title = "A whole sequence, one launch: the weights stay on chip, the programs exchange h"
    parts = [text(12, 264, title, size=16, anchor="start", weight="bold")]
    columns = ((340, "1"), (480, "2"), (620, "3"), (794, "T"))
    names = ("program 1", "program 2", "program 3", "program P")
    bottom = top + 4 * height + 3 * gap
    for k, name in enumerate(names):
        y = top + k * (height + gap)
        middle = y + height / 2
        parts += [text(12, middle + 5, name, anchor="start")]
        for gate, colour in enumerate(GATES.values()):
            parts += [box(98 + 48 * gate, y, 48, height, fill=colour, stroke=colour, rx=0)]
        parts += [text(194, middle + 5, "its units of W_hh, on chip", fill="#ffffff", size=13)]
        parts += [line(290, middle, columns[0][0] - 4, middle, arrow=True)]
        for (x, t), (x_next, _) in zip(columns, (*columns[1:], (None, ""))):
            parts += [box(x, y, 84, height, fill=STATE, stroke=STATE, rx=4)]
            parts += [text(x + 42, middle + 5, f"its h{sub(t)}, c{sub(t)}", fill="#ffffff", size=13)]
            if x_next and t != "3":
                parts += [line(x + 84, middle, x_next - 4, middle, arrow=True)]
        parts += [
            line(704, middle, 726, middle),
            text(743, middle + 4, "…"),
            line(760, middle, 790, middle, arrow=True),
        ]
    for x in (452, 592, 716):
        parts += [line(x, top - 10, x, bottom + 6, width=3)]
        parts += [text(x, top - 16, "barrier", size=12)]
    parts += [line(98, bottom + 22, 878, bottom + 22, arrow=True), text(194, bottom + 40, "read once", size=12)]
    exchange = f"h{sub('t')} goes to the other programs through the L2 cache, c{sub('t')} stays in registers"
    parts += [text(586, bottom + 40, exchange, size=12)]
    return parts


def picture() -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" role="img" '
        'aria-label="What one program of the fused LSTM step owns; how a whole sequence is one launch">'
    )
    arrow = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{INK}"/></marker></defs>'
    )
    return "\n".join([head, arrow, *step(), *sequence(), "</svg>", ""])


if __name__ == "__main__":
    path = Path(__file__).with_name("launches.svg")
    path.write_text(picture(), encoding="utf-8")
    print(path)
