// Colours: what is known of the heads at a moment -> a colour for each, and a legend; safe for the colour-blind.

// Cividis (Nuñez, Anderton and Renslow, PLOS ONE 2018), from nothing to all; and the eight of Okabe and Ito.
const RAMP = [[0, 34, 78], [53, 69, 107], [102, 105, 112], [148, 142, 119], [200, 184, 102], [253, 234, 69]];
const NAMED = ["#56b4e9", "#e69f00", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"];

function onRamp(share) {
  const at = Math.min(1, Math.max(0, share)) * (RAMP.length - 1), low = Math.min(Math.floor(at), RAMP.length - 2);
  const mixed = RAMP[low].map((from, i) => Math.round(from + (at - low) * (RAMP[low + 1][i] - from)));
  return `rgb(${mixed.join(",")})`;
}

const rampStyle = () => `linear-gradient(to right, ${RAMP.map((c) => `rgb(${c.join(",")})`).join(",")})`;

// What heads may be coloured by: a share from 0 to 1 of every head, and it in words.
const MEASURES = {
  bytes: {
    title: "bytes",
    share: (panel, moment, cell) => moment.headBytes[cell] / moment.fullHeadBytes[cell],
    words: (share) => `${percent(share)} of a full cache's bytes`,
  },
  kept: {
    title: "tokens held",
    share: (panel, moment, cell, counts) => counts[cell].kept / moment.seen,
    words: (share) => `${percent(share)} of the tokens`,
  },
  bits: {
    title: "bits of a number",
    share: (panel, moment, cell, counts) => counts[cell].bits / panel.formats[0].bits,
    words: (share, panel) => `${(share * panel.formats[0].bits).toFixed(1)} bits a number`,
  },
  attention: {
    title: "attention held",
    share: (panel, moment, cell) => moment.attention[cell],
    words: (share) => `${percent(share)} of the attention`,
  },
};

const rulesOf = (panels) => [...new Set(panels.flatMap((p) => p.moments.flatMap((m) => m.rules)))];

// The colours of all heads of a panel.
function coloursOf(panel, state, counts, rules) {
  const moment = panel.moments[state.moment];
  if (state.by === "rule") return moment.rules.map((rule) => NAMED[rules.indexOf(rule) % NAMED.length]);
  return panel.cells.map((_, cell) => onRamp(MEASURES[state.by].share(panel, moment, cell, counts)));
}

function fillLegend(element, panel, state, rules) {
  element.replaceChildren();
  if (state.by === "rule") {
    for (const [index, rule] of rules.entries()) {
      const item = document.createElement("span"), swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = NAMED[index % NAMED.length];
      item.append(swatch, rule);
      element.append(item);
    }
    return;
  }
  const ramp = document.createElement("span"), measure = MEASURES[state.by];
  ramp.className = "ramp";
  ramp.style.background = rampStyle();
  element.append(measure.words(0, panel), ramp, measure.words(1, panel));
}
