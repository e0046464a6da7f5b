// Heads: a panel -> a grid with a column for every layer and a row for every KV head, which can be chosen from.

function makeHeads(panel, choose) {
  const grid = document.createElement("div"), cells = new Map();
  grid.className = "heads";
  grid.setAttribute("role", "listbox");
  grid.setAttribute("aria-label", "heads, a column for every layer");
  grid.style.gridTemplateColumns = `repeat(${panel.layers.length}, minmax(3px, 1fr))`;
  panel.cells.forEach(([layer, head], cell) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "head";
    button.setAttribute("role", "option");
    button.dataset.cell = cell;
    button.tabIndex = cell ? -1 : 0;
    button.style.gridColumn = panel.layers.indexOf(layer) + 1;
    button.style.gridRow = head + 1;
    cells.set(`${layer} ${head}`, button);
    grid.append(button);
  });
  grid.addEventListener("click", (event) => {
    const button = event.target.closest(".head");
    if (button) choose(Number(button.dataset.cell));
  });
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const from = event.target.dataset.cell;
    if (!step || from === undefined) return;
    event.preventDefault();
    const [layer, head] = panel.cells[from];
    const next = cells.get(`${panel.layers[panel.layers.indexOf(layer) + step[0]]} ${head + step[1]}`);
    if (!next) return;
    choose(Number(next.dataset.cell));
    next.focus();
  });
  return grid;
}

// What a head is, in a line.
function headInWords(panel, state, cell, counts) {
  const moment = panel.moments[state.moment], [layer, head] = panel.cells[cell], { kept } = counts[cell];
  const measures = ["bytes", "attention"].map((name) => {
    const measure = MEASURES[name];
    return measure.words(measure.share(panel, moment, cell, counts), panel);
  });
  const bits = kept && panel.formats.length > 1 ? `, ${counts[cell].bits.toFixed(1)} bits a number` : "";
  return (
    `Layer ${layer}, head ${head} (${moment.rules[cell]}): ${number(kept)} of ${number(moment.seen)} tokens${bits}, ` +
    `${bytesAsText(moment.headBytes[cell])}, ${measures.join(", ")}`
  );
}

function paintHeads(grid, panel, state, counts, rules) {
  const colours = coloursOf(panel, state, counts, rules), held = panel.held[state.moment], total = panel.pieces.length;
  for (const button of grid.children) {
    const cell = Number(button.dataset.cell), words = headInWords(panel, state, cell, counts);
    button.style.background = colours[cell];
    button.title = words;
    button.setAttribute("aria-label", words);
    button.setAttribute("aria-selected", String(state.cell === cell));
    button.tabIndex = cell === (state.cell ?? 0) ? 0 : -1;
    button.classList.toggle("without", state.token !== null && held[cell * total + state.token] === GONE);
  }
}
