"""The page around a report: style, script and frame of one HTML file that loads nothing from anywhere.

A content security policy in the page itself forbids every connection, so "opens offline" is enforced by the browser.
Colours are variables with a light and a dark value; errors differ in shape as well as in colour.
"""

from html import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; media-src data:; img-src data:"

STYLE = """
:root { color-scheme: light dark;
  --paper: #f6f5f1; --card: #ffffff; --ink: #1c1d21; --soft: #62656f; --rule: #e2e0d9; --accent: #2f6b4f;
  --sub: #a34d00; --sub-bg: #fdecd6; --del: #b3261e; --del-bg: #fbe4e1; --ins: #1d55b5; --ins-bg: #e1ebfb;
  --s0: #2a6fc9; --s1: #d9622b; --s2: #1f9d6c; --s3: #7a4fc0; --s4: #b8860b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #131417; --card: #1c1e23; --ink: #eceae4; --soft: #9da1ab; --rule: #30333a; --accent: #7fc9a3;
  --sub: #ffb868; --sub-bg: #45300f; --del: #ff9d94; --del-bg: #4a1f1c; --ins: #9cc3ff; --ins-bg: #1a325c;
  --s0: #6aa7f5; --s1: #f59163; --s2: #4fcb99; --s3: #b394f0; --s4: #e0b64a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 20px 80px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; letter-spacing: -0.005em; }
h3 { font-size: 14px; margin: 20px 0 8px; color: var(--soft); font-weight: 600; }
.note { color: var(--soft); font-size: 13px; margin: 6px 0; }
.card, figure.chart, .utt { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 20px 22px; }
.hero { display: grid; grid-template-columns: minmax(230px, 1fr) 2fr; gap: 28px; margin-top: 22px;
  align-items: center; }
.hero .big { font-size: 60px; font-weight: 650; line-height: 1; letter-spacing: -0.03em; }
.hero .big small { font-size: 26px; font-weight: 500; color: var(--soft); }
.hero .label { color: var(--soft); font-weight: 600; margin-bottom: 8px; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 16px 20px; }
.stats div { border-left: 2px solid var(--rule); padding-left: 11px; }
.stats b { display: block; font-size: 19px; font-weight: 600; font-variant-numeric: tabular-nums; }
.stats span { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: var(--soft); font-size: 12.5px; }
th, td { padding: 8px 14px; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td.main { font-weight: 650; }
.bar { display: flex; height: 10px; border-radius: 3px; overflow: hidden; gap: 1px; min-width: 90px; }
.bar i { display: block; min-width: 2px; }
.bar .sub, .dotkey.sub { background: var(--sub); } .bar .del, .dotkey.del { background: var(--del); }
.bar .ins, .dotkey.ins { background: var(--ins); }
.dotkey { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 5px 0 12px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); gap: 14px; }
figure.chart { margin: 0; padding: 12px 12px 4px; position: relative; }
figcaption { display: flex; justify-content: space-between; gap: 12px; flex-wrap: wrap; font-size: 13px; }
.legend { display: flex; gap: 12px; flex-wrap: wrap; color: var(--soft); font-size: 12px; }
.key::before { content: ""; display: inline-block; width: 12px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; background: var(--c); }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); } .s4 { --c: var(--s4); }
svg { display: block; width: 100%; height: auto; }
.grid { stroke: var(--rule); stroke-width: 1; } .tick { fill: var(--soft); font-size: 10.5px; }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; } 
.line.faint { opacity: .25; stroke-width: 1; }
.dot { fill: var(--c); }
.tip { position: absolute; pointer-events: none; background: var(--ink); color: var(--paper); font-size: 12px;
  padding: 4px 8px; border-radius: 5px; white-space: nowrap; z-index: 2; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 14px; }
.columns .card { padding: 14px 18px; } .columns h3 { margin-top: 0; }
ol.plain { list-style: none; margin: 0; padding: 0; }
ol.plain li { display: flex; justify-content: space-between; gap: 12px; padding: 2px 0; }
ol.plain em { font-style: normal; color: var(--soft); font-variant-numeric: tabular-nums; }
.tools { display: flex; gap: 10px; flex-wrap: wrap; margin: 0 0 12px; }
.tools input, .tools select { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule);
  border-radius: 7px; padding: 6px 10px; } .tools input { flex: 1 1 220px; }
.utt { padding: 14px 18px; margin-bottom: 10px; }
.utt header { display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; font-size: 13px; color: var(--soft); }
.utt header b { color: var(--ink); font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-weight: 600;
  overflow-wrap: anywhere; }
.utt header audio { height: 32px; margin-left: auto; max-width: 100%; }
.badge { border: 1px solid var(--rule); border-radius: 20px; padding: 0 8px; font-size: 12px; }
.pairs { margin: 12px 0 6px; display: flex; flex-wrap: wrap; gap: 8px 4px; } .pairs.char { gap: 8px 1px; }
.pair { display: inline-grid; grid-template-rows: 1fr 1fr; text-align: center; border-radius: 5px; padding: 1px 5px;
  max-width: 100%; overflow-wrap: anywhere; }
.pairs.char .pair { padding: 1px 2px; }
.pair u, .pair s, .pair span { text-decoration: none; min-height: 1.5em; }
.pair.hit { color: var(--soft); } .pair.hit span + span { opacity: .5; }
.pair.sub { background: var(--sub-bg); color: var(--sub); } .pair.sub u { font-weight: 650; }
.pair.del { background: var(--del-bg); color: var(--del); } .pair.del s { text-decoration: line-through; }
.pair.ins { background: var(--ins-bg); color: var(--ins); } 
.pair.ins u { font-weight: 650; text-decoration: underline; }
details, .details { font-size: 13px; color: var(--soft); } summary { cursor: pointer; }
details dl, .details dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 14px; margin: 8px 0 2px; }
details dd, .details dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; white-space: pre-wrap; }
a { color: var(--accent); }
@media (max-width: 700px) { .hero { grid-template-columns: 1fr; } .utt header audio { margin-left: 0; width: 100%; } }
@media print { .tools, audio { display: none; } .utt { break-inside: avoid; } }
"""

SCRIPT = """
for (const chart of document.querySelectorAll("figure.chart")) {
  const lines = JSON.parse(chart.dataset.points), percent = chart.dataset.percent === "1";
  const svg = chart.querySelector("svg"), tip = chart.querySelector(".tip");
  const show = value => percent ? (100 * value).toFixed(2) + "%" : String(Number(value.toPrecision(4)));
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / box.width;
    const at = (event.clientX - box.left) * scale;
    const near = lines.map(line => line.p.reduce((a, b) => Math.abs(b[2] - at) < Math.abs(a[2] - at) ? b : a));
    const step = near.reduce((a, b) => Math.abs(b[2] - at) < Math.abs(a[2] - at) ? b : a)[0];
    tip.textContent = "step " + step + "  " + near.map((p, i) => lines[i].n + " " + show(p[1])).join("  ");
    tip.hidden = false;
    const left = event.clientX - chart.getBoundingClientRect().left;
    tip.style.left = Math.max(4, Math.min(left + 12, chart.clientWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = event.clientY - chart.getBoundingClientRect().top - 34 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
const list = document.getElementById("worst");
if (list) {
  const cards = [...list.children], find = document.getElementById("find"), order = document.getElementById("order");
  find.addEventListener("input", () => {
    const wanted = find.value.trim().toLowerCase();
    for (const card of cards) card.hidden = !card.textContent.toLowerCase().includes(wanted);
  });
  order.addEventListener("change", () => {
    const key = order.value;
    list.append(...cards.slice().sort((a, b) => Number(b.dataset[key]) - Number(a.dataset[key])));
  });
  document.querySelector(".tools").hidden = false;
  list.addEventListener("play", event => {
    for (const other of list.querySelectorAll("audio")) if (other !== event.target) other.pause();
  }, true);
}
"""


def page(title: str, body: str) -> str:
    """Return a whole document; `body` is HTML, `title` is text."""
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
