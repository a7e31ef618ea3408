"""The figures of docs/concepts/, drawn from the library's own numbers:  python docs/site/figures.py [FOLDER]

SVG without a plotting library: small, the same on every machine, and in colours that follow the page. As an image each
follows the system's light or dark; docs/site/hooks.py puts it into the site's page, whose own switch it then follows.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from repavit_ops import create_model
from repavit_ops.models import complexity
from repavit_ops.nn.join_schedule import JoinCurve

FOLDER = Path(__file__).resolve().parent.parent / "concepts"
BLUE, ORANGE, GREEN = "#4a86e8", "#e07b28", "#3f9f6b"  # at least 3:1 on white and on the dark page alike
STYLE = ".figure{color:#222}@media(prefers-color-scheme:dark){.figure{color:#ddd}}"


class Drawing:
    """Boxes, arrows, curves and words in a picture of a given size; units are pixels, y goes down."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" class="figure" role="img" '
            f'font-family="system-ui,sans-serif" font-size="13" fill="currentColor"><title>{title}</title>'
            f"<style>{STYLE}</style>"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0 8 4 0 8z" fill="currentColor"/></marker></defs>'
        ]

    def text(self, x: float, y: float, words: str, anchor: str = "middle", colour: str = "currentColor") -> None:
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}">{words}</text>')

    def box(self, x: float, y: float, width: float, height: float, words: str, colour: str) -> None:
        """A box around its centre."""
        self.parts.append(
            f'<rect x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{colour}" fill-opacity=".16" stroke="{colour}"/>'
        )
        self.text(x, y + 4.5, words)

    def line(self, points: Sequence[tuple[float, float]], colour: str = "currentColor", *, arrow: bool = False) -> None:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        tip, width = (' marker-end="url(#tip)"', 1.3) if arrow else ("", 2 if colour != "currentColor" else 1)
        self.parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{width:g}"{tip}/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        self.line(points, arrow=True)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


class Axes:
    """A chart's frame in a drawing: data x in [0, 1], data y in [0, top]."""

    def __init__(self, drawing: Drawing, left: float, upper: float, width: float, height: float, top: float) -> None:
        self.drawing, self.top = drawing, top
        self.left, self.lower, self.width, self.height = left, upper + height, width, height
        drawing.line([(left, upper), (left, self.lower), (left + width, self.lower)])

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.left + x * self.width, self.lower - y / self.top * self.height

    def labels(self, across: dict[float, str], up: dict[float, str], x_name: str, y_name: str) -> None:
        for value, words in across.items():
            self.drawing.text(self.at(value, 0)[0], self.lower + 18, words)
        for value, words in up.items():
            self.drawing.text(self.left - 8, self.at(0, value)[1] + 4.5, words, "end")
        self.drawing.text(self.left + self.width / 2, self.lower + 38, x_name)
        self.drawing.text(self.left, self.lower - self.height - 12, y_name, "start")


def channel_idle_merge() -> str:
    """The FFN in training, and what it is deployed as."""
    d = Drawing(720, 260, "Channel-idle FFN: training form and deployed form")
    d.text(180, 22, "training")
    d.box(180, 50, 60, 28, "x", "#888888")
    d.box(180, 100, 130, 30, "BatchNorm, fc1", BLUE)
    d.box(108, 155, 136, 30, "GELU: m channels", ORANGE)
    d.box(252, 155, 136, 30, "idle: ρC - m", GREEN)
    d.box(180, 210, 130, 30, "BatchNorm, fc2", BLUE)
    for points in (
        ((180, 64), (180, 84)),
        ((150, 115), (120, 139)),
        ((210, 115), (240, 139)),
        ((120, 170), (150, 194)),
        ((240, 170), (210, 194)),
        ((150, 50), (30, 50), (30, 210), (114, 210)),
    ):
        d.arrow(*points)
    d.text(36, 205, "+ x", "start")
    d.text(540, 22, "deployed")
    d.box(540, 50, 60, 28, "x", "#888888")
    d.box(470, 105, 130, 30, "W2 x + b2 [m]", ORANGE)
    d.box(620, 130, 130, 30, "W1 x [C x C]", GREEN)
    d.box(470, 155, 130, 30, "W3 GELU", ORANGE)
    d.box(540, 210, 60, 30, "+ b1", BLUE)
    for points in (
        ((525, 64), (480, 89)),
        ((555, 64), (612, 114)),
        ((470, 120), (470, 139)),
        ((480, 170), (525, 194)),
        ((612, 145), (555, 194)),
    ):
        d.arrow(*points)
    d.text(345, 135, "=")
    d.text(360, 250, "fc1, fc2, both norms and the shortcut are linear where no channel is activated: one C x C matrix")
    return d.svg()


def idle_ratio_work() -> str:
    """Multiplications of a whole model against θ, by the library's own count."""
    ratios = [i / 8 for i in range(9)]
    d = Drawing(720, 320, "Work of merged models against the idle ratio")
    axes = Axes(d, 70, 40, 520, 220, 1.25)
    axes.labels(
        {r: f"{r:g}" for r in (0, 0.25, 0.5, 0.75, 1)},
        {v: f"{v:.0%}" for v in (0, 0.25, 0.5, 0.75, 1)},
        "idle ratio θ",
        "multiplications of the merged model, of the vanilla one",
    )
    d.parts.append('<g stroke-dasharray="3 4" opacity=".5">')
    d.line([axes.at(0, 1), axes.at(1, 1)])
    d.parts.append("</g>")
    for row, (name, colour) in enumerate((("deit_tiny", BLUE), ("deit_base", ORANGE), ("vit_large", GREEN))):
        with torch.device("meta"):
            vanilla = complexity(create_model(f"vanilla_{name}").eval()).macs
            shares = [
                complexity(create_model(f"repa_{name}", idle_ratio=r, form="deployed").eval()).macs / vanilla
                for r in ratios
            ]
        d.line([axes.at(r, share) for r, share in zip(ratios, shares, strict=True)], colour)
        d.text(600, 170 + 24 * row, f"{name}: {shares[6]:.0%}", "start", colour)
    d.text(600, 146, "at θ = 0.75", "start")
    return d.svg()


def joined_branches() -> str:
    """Two branches in training, and the one that they merge to."""
    d = Drawing(720, 270, "Joined branches: training form and merged form")
    d.text(200, 22, "training, B = 2")
    d.box(200, 50, 90, 28, "n(x)", "#888888")
    for x, b in ((80, 1), (320, 2)):
        d.box(x, 105, 110, 30, f"h{b} = W1,{b} n", BLUE)
        d.box(x, 165, 130, 30, "GELU", ORANGE)
        d.box(x, 220, 100, 30, f"W2,{b}", BLUE)
        d.arrow((200 + (x - 200) / 4, 64), (x, 89))
        d.arrow((x, 120), (x, 149))
        d.arrow((x, 180), (x, 204))
    d.arrow((110, 120), (280, 149))
    d.arrow((290, 120), (120, 149))
    d.text(200, 110, "(1-α) h + ακ Σ h")
    d.text(200, 225, "+")
    d.text(445, 135, "= at α = 1")
    d.text(590, 22, "merged")
    d.box(590, 50, 90, 28, "n(x)", "#888888")
    d.box(590, 105, 140, 30, "κ (W1,1 + W1,2)", BLUE)
    d.box(590, 165, 140, 30, "GELU", ORANGE)
    d.box(590, 220, 140, 30, "W2,1 + W2,2", BLUE)
    for upper, lower in ((64, 89), (120, 149), (180, 204)):
        d.arrow((590, upper), (590, lower))
    d.text(360, 260, "Equal inputs of GELU in every branch: the sum of their outputs is one branch with summed W2")
    return d.svg()


def join_schedule() -> str:
    """α over a training, by the schedule that the library uses."""
    d = Drawing(720, 250, "The join coefficient over a training")
    axes = Axes(d, 70, 40, 520, 150, 1.0)
    axes.labels(
        {0: "0", 0.1: "10 %", 0.6: "60 %", 1: "100 %"}, {0: "0", 0.5: "0.5", 1: "1"}, "of the training's steps", "α"
    )
    steps = 200
    for row, (shape, colour) in enumerate((("linear", BLUE), ("cosine", ORANGE))):
        curve = JoinCurve(steps=steps, shape=shape)  # type: ignore[arg-type]
        d.line([axes.at(s / steps, curve(s)) for s in range(0, steps + 1, 2)], colour)
        d.text(600, 110 + 24 * row, shape, "start", colour)
    return d.svg()


FIGURES = {
    "channel-idle-merge.svg": channel_idle_merge,
    "idle-ratio-work.svg": idle_ratio_work,
    "joined-branches.svg": joined_branches,
    "join-schedule.svg": join_schedule,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, draw in FIGURES.items():
        (folder / name).write_text(draw())
