"""Assets: the skeleton, the style sheet and the small script of the report page."""

from __future__ import annotations

import base64
import gzip

__all__ = ["document"]

CSS = """
:root {
  color-scheme: light dark;
  --ink: #25303a; --soft: #5d6a76; --line: #dfe4e9;
  --paper: #ffffff; --wash: #f5f7f9; --accent: #0f766b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e4e8ec; --soft: #9aa7b3; --line: #313b45;
    --paper: #14191e; --wash: #1b2229; --accent: #4fb8aa;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 40px 28px 80px; max-width: 980px; background: var(--paper); color: var(--ink);
  font: 15.5px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
}
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -0.015em; margin: 0 0 6px; font-weight: 650; }
h2 { font-size: 20px; line-height: 1.3; letter-spacing: -0.01em; margin: 0 0 4px; font-weight: 620; }
p { margin: 0 0 14px; max-width: 68ch; color: var(--soft); }
section { margin-top: 56px; scroll-margin-top: 16px; }
a { color: var(--accent); text-underline-offset: 2px; }
.answer { font-size: 18px; line-height: 1.45; color: var(--ink); max-width: 62ch; margin: 12px 0; }
.facts { font-size: 14px; }
.save { font-size: 12.5px; margin: 2px 0 0; }
.save button {
  border: 1px solid var(--line); border-radius: 4px; background: none; color: var(--accent);
  font: inherit; padding: 1px 7px; margin-left: 4px; cursor: pointer;
}
nav { display: flex; flex-direction: column; gap: 4px; margin-top: 26px; font-size: 14.5px; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
figure { margin: 22px 0 0; }
figcaption { font-weight: 600; font-size: 14px; margin-bottom: 6px; overflow-wrap: anywhere; }
.plot { width: 100%; min-height: 60px; }
.keys { display: flex; flex-wrap: wrap; gap: 4px 6px; margin: 0 0 4px -6px; }
.keys button {
  display: inline-flex; align-items: center; gap: 6px; border: 0; border-radius: 5px; padding: 2px 7px;
  background: none; color: var(--soft); font: inherit; font-size: 13px; line-height: 1.4; cursor: pointer;
}
.keys button:hover { background: var(--wash); color: var(--ink); }
.keys button[aria-pressed="false"] { opacity: 0.4; text-decoration: line-through; }
.keys .box { width: 11px; height: 11px; border-radius: 2px; background: var(--c); }
.keys .dot { width: 10px; height: 10px; border-radius: 50%; background: var(--c); }
.keys .line { width: 16px; height: 0; border-top: 2px solid var(--c); }
.evidence {
  list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px;
  margin: 14px 0 18px; padding: 0; font-size: 13.5px; color: var(--soft);
}
.evidence li { display: inline-flex; align-items: center; gap: 7px; }
.evidence b { color: var(--ink); font-weight: 600; }
.swatch { width: 22px; height: 12px; border-radius: 2px; border: 1.2px solid var(--soft); }
.swatch.measured, .swatch.replayed { background: var(--soft); }
.swatch.modelled {
  background: repeating-linear-gradient(-45deg, var(--soft) 0 1.3px, transparent 1.3px 5px);
}
.swatch.interpolated {
  background: repeating-linear-gradient(0deg, var(--soft) 0 1px, transparent 1px 4px);
}
.swatch.published { width: 11px; height: 11px; transform: rotate(45deg); margin: 0 5px; border-radius: 0; }
.swatch.bound { height: 0; border: 0; border-top: 2px dotted var(--soft); border-radius: 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
}
td { white-space: nowrap; max-width: 46ch; overflow: hidden; text-overflow: ellipsis; }
#failures td { white-space: normal; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
details { margin-top: 10px; font-size: 13.5px; }
summary { cursor: pointer; color: var(--soft); }
summary:hover { color: var(--ink); }
details[open] .scroll { max-height: 420px; overflow: auto; }
#missing ul { padding-left: 18px; color: var(--soft); }
#missing b { color: var(--ink); font-weight: 600; }
noscript p { background: var(--wash); padding: 10px 14px; }
@media (max-width: 620px) {
  body { padding: 24px 16px 60px; font-size: 15px; }
  h1 { font-size: 23px; }
  h2 { font-size: 18px; }
  section { margin-top: 44px; }
}
@media print { .keys button { cursor: default; } nav, .save { display: none; } }
"""

UNPACK = """
const late = "This browser cannot unpack the figures (browsers from 2023 on can); tables do without.";
async function unpack() {
  try {
    const text = document.getElementById("packed").textContent;
    const letters = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;,=>?@^_`{|}~";
    const value = new Uint8Array(128);
    for (let i = 0; i < 85; i++) value[letters.charCodeAt(i)] = i;
    const groups = Math.ceil(text.length / 5);
    const bytes = new DataView(new ArrayBuffer(4 * groups));
    for (let g = 0; g < groups; g++) {
      let word = 0;
      for (let i = 5 * g; i < 5 * g + 5; i++) {
        word = 85 * word + (i < text.length ? value[text.charCodeAt(i)] : 84);
      }
      bytes.setUint32(4 * g, word);
    }
    const size = Math.floor(text.length * 4 / 5);
    const zipped = new Blob([bytes.buffer.slice(0, size)]).stream();
    const script = document.createElement("script");
    script.textContent = await new Response(zipped.pipeThrough(new DecompressionStream("gzip"))).text();
    document.head.append(script);
  } catch (error) {
    const note = document.createElement("p");
    note.className = "answer";
    note.textContent = late;
    document.querySelector("header").append(note);
    throw error;
  }
}
"""

SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const ink = () => (dark.matches ? "#c3ccd5" : "#3b4652");
const narrow = () => window.innerWidth < 620;
const drawn = {};
window.draw = (id, data, layout, title, keys) => {
  drawn[id] = {data, layout: structuredClone(layout), title, keys};
  layout.font.color = ink();
  if (narrow()) {
    layout.font.size = 11.5;
    layout.margin.r = 10;
    for (const trace of data) {
      if (trace.mode === "markers+text") trace.mode = "markers";
    }
  }
  Plotly.newPlot(id, data, layout, {responsive: true, displayModeBar: false, displaylogo: false});
};
dark.addEventListener("change", () => {
  for (const id of Object.keys(drawn)) Plotly.relayout(id, {"font.color": ink()});
});
// A copy for a talk: white, with its title, its legend as a line of text and letters that a room can read.
function copy(id, kind) {
  const {data, layout, title, keys} = drawn[id];
  const square = (colour) => `<span style="color:${colour}">\u25a0</span>`;
  const legend = keys.map(([name, colour]) => `${square(colour)} ${name}`).join("   ");
  const width = 1000;
  const figure = {data, layout: {
    ...layout, width, height: layout.height + 110, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
    font: {...layout.font, size: 15, color: "#1f2933"}, margin: {...layout.margin, t: 100, r: 40, l: 20},
    title: {
      text: `<b>${title}</b><br>${legend}`, font: {size: 17},
      x: 0.02, xanchor: "left", y: 0.97, yanchor: "top",
    },
  }};
  const options = {format: kind, width, height: figure.layout.height, scale: kind === "png" ? 2 : 1};
  Plotly.downloadImage(figure, {...options, filename: `bratune-${id}`});
}
for (const button of document.querySelectorAll("[data-save]")) {
  button.addEventListener("click", () => copy(button.dataset.for, button.dataset.save));
}
for (const keys of document.querySelectorAll(".keys")) {
  for (const button of keys.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      const plot = document.getElementById(keys.dataset.for);
      const group = button.dataset.group;
      const hit = [...plot.data.keys()].filter((i) => plot.data[i].legendgroup === group);
      if (hit.length) Plotly.restyle(plot, {visible: on}, hit);
    });
  }
}
for (const link of document.querySelectorAll("a[download]")) {
  link.href = URL.createObjectURL(new Blob([files[link.download]], {type: "text/csv"}));
}
plots();
"""


def packed(script: str) -> str:
    """A script as gzip in base 85: less than four tenths of its size; the same script gives the same text."""
    body = base64.b85encode(gzip.compress(script.encode(), 9, mtime=0)).decode("ascii")
    return body.replace("<", ",")  # "<" could begin an end of the element; "," is not in the alphabet


def document(*, title: str, body: str, script: str) -> str:
    """The page: everything inside, nothing fetched.

    Args:
        title: In HTML.
        body: In HTML.
        script: Plotly, the texts of ``files`` by name, and the function ``plots`` that calls ``draw``.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f"{body}\n"
        "<noscript><p>The figures and the CSV files need JavaScript; the tables do not.</p></noscript>\n"
        f'<script type="text/plain" id="packed">{packed(script)}</script>\n'
        f"<script>{UNPACK}\nunpack().then(() => {{\n{SCRIPT}\n}});</script>\n</body>\n</html>\n"
    )
