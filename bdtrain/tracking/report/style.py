"""The look of a report: styles and a few lines of script, all inside the page."""

from __future__ import annotations

import html
import os
import re

from bdtrain.tracking.spool import redact

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a browser may load for the page: nothing."""

_COLOURS = """\
  --paper: #fbfbf9; --card: #fff; --ink: #1d2126; --soft: #5c6570; --line: #e1e3e1; --grid: #ecedeb;
  --curve: #1f6fb2; --bar: #1f6fb2; --level: #a9620b; --good: #1b7a48; --warn: #a9620b; --bad: #b3302b;
  --s0: #6a3d9a; --s1: #1f6fb2; --s2: #17868a; --s3: #4f8f2f; --s4: #b0820f; --s5: #b3302b;
"""

_DRAWN = """\
svg text { fill: var(--soft); font-size: 11.5px; }
svg .y, svg .unit, svg text.level { text-anchor: end; }
svg .x { text-anchor: middle; }
svg .grid { stroke: var(--grid); }
svg .axis, svg .tick { stroke: var(--soft); }
svg .curve { fill: none; stroke: var(--curve); stroke-width: 1.6; stroke-linejoin: round; }
svg .dots { fill: var(--curve); }
svg .bar0 { stroke: var(--bar); stroke-width: 4; opacity: .6; }
svg .bar1 { stroke: var(--bar); stroke-width: 1.2; opacity: .6; }
svg path.level { stroke: var(--level); stroke-dasharray: 5 4; }
svg text.level { fill: var(--level); paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
svg .attempt path { stroke: var(--warn); stroke-width: 1.4; stroke-dasharray: 2 3; }
svg .fault path { fill: var(--bad); }
svg.plot { display: block; }
.s0 { --own: var(--s0); } .s1 { --own: var(--s1); } .s2 { --own: var(--s2); }
.s3 { --own: var(--s3); } .s4 { --own: var(--s4); } .s5 { --own: var(--s5); }
svg .series polyline { fill: none; stroke: var(--own); stroke-width: 1.4; stroke-linejoin: round; }
svg .series path { stroke: var(--own); stroke-width: 1.2; opacity: .75; }
svg .series circle { fill: var(--own); }
svg .series .bin { stroke: transparent; stroke-width: 9; }
svg .band { fill: var(--level); opacity: .14; }
svg .spot-current { fill: none; stroke: var(--ink); stroke-width: 1.6; }
svg .spot-winner { fill: none; stroke: var(--good); stroke-width: 3; }
svg .range { fill: var(--curve); opacity: .13; }
svg .beta, svg .omega { fill: none; stroke: var(--s1); stroke-width: 1.8; }
svg .omega { stroke: var(--s4); }
svg text.beta, svg text.omega { text-anchor: end; stroke: none; fill: var(--s1); }
svg text.omega { fill: var(--s4); }
svg .cursor { fill: var(--curve); stroke: var(--card); stroke-width: 2; visibility: hidden; }
"""

PICTURE_STYLE = f":root {{ {_COLOURS} }}\n{_DRAWN}"
"""The styles of a picture that is a file of its own, on light paper."""

STYLE = (
    """
:root {
  color-scheme: light dark;
"""
    + _COLOURS
    + """\
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --card: #1c2024; --ink: #e6e8ea; --soft: #9aa4ae; --line: #31373d; --grid: #282d32;
    --curve: #6cb2f0; --bar: #6cb2f0; --level: #e5a55a; --good: #5cc48c; --warn: #e5a55a; --bad: #f0807a;
    --s0: #b794e0; --s1: #6cb2f0; --s2: #58c4c4; --s3: #95cf74; --s4: #e2bb55; --s5: #f0807a;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 20px 16px 60px; }
h1 { font-size: 24px; margin: 8px 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 34px 0 10px; }
p { margin: 6px 0; }
.soft, .note, figcaption span { color: var(--soft); }
.note { font-size: 13px; }
.state { display: inline-block; font-weight: 600; border-left: 4px solid; padding: 2px 10px; }
.state.finished, .state.running { color: var(--good); }
.state.stopped { color: var(--warn); }
.state.failed, .state.killed { color: var(--bad); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 14px 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; }
.numbers > div, figure, pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
.numbers > div { padding: 12px 14px; }
.numbers b { display: block; font-size: 26px; line-height: 1.25; font-weight: 600; }
.numbers small { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 4px 18px 4px 0; }
tr { border-bottom: 1px solid var(--line); }
th { font-weight: 500; color: var(--soft); white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
tr.fault td { color: var(--bad); }
.compare { display: grid; grid-template-columns: max-content 1fr max-content; gap: 6px 12px; }
.compare > * { align-self: center; }
.compare i { display: block; height: 14px; background: var(--level); opacity: .55; border-radius: 2px; }
.compare i.own { background: var(--curve); opacity: 1; }
.compare i.early { background: var(--curve); opacity: .4; }
.compare output { font-variant-numeric: tabular-nums; }
.axes { display: flex; flex-wrap: wrap; gap: 4px; margin: 0 0 10px; }
.pick { position: absolute; opacity: 0; }
.axes label { border: 1px solid var(--line); border-radius: 4px; padding: 3px 12px; cursor: pointer; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 10px 12px; }
figcaption { font-weight: 600; display: flex; gap: 8px; flex-wrap: wrap; }
figcaption span, figcaption output { font-weight: 400; }
figcaption output { margin-left: auto; font-variant-numeric: tabular-nums; }
svg { display: none; width: 100%; height: auto; touch-action: pan-y; }
"""
    + _DRAWN
    + """\
.time { display: flex; height: 22px; border-radius: 4px; overflow: hidden; background: var(--line); }
.time span { min-width: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 8px 0; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
figure .legend { font-size: 13px; color: var(--soft); margin: 2px 0; gap: 0 14px; }
.legend i.s0, .legend i.s1, .legend i.s2, .legend i.s3, .legend i.s4, .legend i.s5 { background: var(--own); }
.legend i.dashes { background: none; height: 0; width: 16px; border-top: 2px dashed var(--level);
  border-radius: 0; vertical-align: middle; }
.legend i.ring-current, .legend i.ring-winner { border-radius: 50%; border: 2px solid var(--ink); }
.legend i.ring-winner { border-color: var(--good); border-width: 3px; }
table.refits { font-size: 14px; }
table.refits td, table.refits th { padding-right: 14px; }
table.refits tr.first { border-bottom: 0; }
table.refits td.w { white-space: nowrap; }
table.refits td.why { font-size: 13px; color: var(--soft); padding: 0 0 4px 44px; white-space: normal; }
table.refits tr.fault td.why { color: var(--bad); }
/* Where the table is wider than the screen: in sight wherever it is moved to. */
table.refits td.why div { position: sticky; left: 0; max-width: calc(100vw - 32px); }
.a-training { background: var(--curve); } .a-setup { background: #8a93a0; }
.a-data_wait { background: #c9a227; }
.a-validation { background: #4f9d8f; } .a-checkpoint { background: #9a78c2; }
.a-refit { background: #c2698b; }
.a-other { background: #b9bec4; }
.a-lost { background: var(--bad); } .a-down { background: #59616b; }
pre { padding: 10px 12px; margin: 6px 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font-size: 13px; }
code { font-size: 13px; overflow-wrap: anywhere; }
details { margin: 6px 0; }
summary { cursor: pointer; }
@media (max-width: 560px) {
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; }
  .compare { grid-template-columns: 1fr max-content; }
  .compare > span { grid-column: 1 / -1; margin-bottom: -6px; }
  svg text { font-size: 14px; }
  table.refits td { white-space: nowrap; }
  table.refits td.why { padding-left: 0; }
}
"""
)

SCRIPT = """
const points = JSON.parse(document.getElementById("points").textContent);
for (const svg of document.querySelectorAll("figure svg")) {
  const figure = svg.closest("figure");
  if (!Object.hasOwn(points, figure.dataset.metric ?? "")) continue;
  const {steps, values} = points[figure.dataset.metric];
  const line = svg.querySelector(".curve").points, cursor = svg.querySelector(".cursor");
  const said = figure.querySelector("figcaption output");
  svg.addEventListener("pointermove", event => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    let best = 0;
    for (let i = 1; i < line.length; i++) if (Math.abs(line[i].x - x) < Math.abs(line[best].x - x)) best = i;
    cursor.setAttribute("cx", line[best].x); cursor.setAttribute("cy", line[best].y);
    cursor.style.visibility = "visible";
    const value = Number(values[best].toPrecision(5));
    said.textContent = `step ${steps[best].toLocaleString("en")}: ${value}`;
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; said.textContent = ""; });
}
"""


def axis_rules(names: list[str]) -> str:
    """The styles by which the chosen horizontal axis shows, without any script.

    Args:
        names: of the axes.
    """
    rules = []
    for name in names:
        rules.append(f"#pick-{name}:checked ~ * .on-{name} {{ display: block; }}")
        rules.append(
            f'#pick-{name}:checked ~ .axes label[for="pick-{name}"] '
            "{ border-color: var(--curve); color: var(--curve); }"
        )
        rules.append(
            f'#pick-{name}:focus-visible ~ .axes label[for="pick-{name}"] '
            "{ outline: 2px solid var(--curve); }"
        )
    return "\n".join(rules)


_NOT_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(value: object) -> str:
    """Anything as text: no control characters, no credentials of an address."""
    return _NOT_TEXT.sub("\ufffd", redact(str(value), os.environ))


def escape(value: object) -> str:
    """Anything as text of the page: what ``clean`` leaves, without tags."""
    return html.escape(clean(value))
