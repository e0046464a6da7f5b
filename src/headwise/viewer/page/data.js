// Data: what the page carries -> panels whose `held[moment]` says of every head and token how it is held.
"use strict";

const GONE = 0;

async function loadPanels() {
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const panel of data.panels) {
    const bytes = await inflate(panel.held);
    const size = panel.cells.length * panel.pieces.length;
    // Each moment is the difference to the one before.
    for (let at = size; at < bytes.length; at++) bytes[at] ^= bytes[at - size];
    panel.held = panel.moments.map((_, index) => bytes.subarray(index * size, (index + 1) * size));
    // How any head holds any token, by its place in `formats`.
    panel.used = [...new Set(panel.held.at(-1)), ...new Set(panel.held[0])].filter((how) => how !== GONE).map((how) => how - 1);
    panel.layers = [...new Set(panel.cells.map(([layer]) => layer))];
    panel.heads = Math.max(...panel.cells.map(([, head]) => head)) + 1;
  }
  return data;
}

async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// How a head holds each token at a moment.
function heldBy(panel, moment, cell) {
  const count = panel.pieces.length;
  return panel.held[moment].subarray(cell * count, (cell + 1) * count);
}

// Of every head: tokens held, and bits of a number on average.
function countsOf(panel, moment) {
  return panel.cells.map((_, cell) => {
    let kept = 0, bits = 0;
    for (const how of heldBy(panel, moment, cell)) {
      if (how === GONE) continue;
      kept++;
      bits += panel.formats[how - 1].bits;
    }
    return { kept, bits: kept ? bits / kept : 0 };
  });
}

// Of every token: how many heads hold it.
function holdersOf(panel, moment) {
  const count = panel.pieces.length, holders = new Uint16Array(count), held = panel.held[moment];
  for (let cell = 0; cell < panel.cells.length; cell++)
    for (let token = 0; token < count; token++) if (held[cell * count + token] !== GONE) holders[token]++;
  return holders;
}

function bytesAsText(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 1024 && unit < units.length - 1; unit++) count /= 1024;
  return `${unit && count < 100 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const number = (count) => count.toLocaleString("en");
