// Text: the tokens of a panel -> marks of how strongly each is held, and places where something is found.

const STRENGTHS = 10;
// Of a block that is laid out only when it is seen.
const TOKENS_OF_A_BLOCK = 200;

function makeText(panel, choose) {
  const box = document.createElement("div"), tokens = [];
  box.className = "text";
  box.tabIndex = 0;
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "text; arrows choose a token");
  let block = null;
  panel.pieces.forEach((piece, token) => {
    if (token === panel.prompt) {
      const line = document.createElement("div");
      line.className = "answer-begins";
      line.textContent = "answer";
      box.append(line);
      block = null;
    }
    if (!block) {
      block = document.createElement("div");
      block.className = "lines";
      box.append(block);
    }
    const span = document.createElement("span");
    span.textContent = piece;
    span.dataset.token = token;
    tokens.push(span);
    block.append(span);
    if (piece.endsWith("\n") && block.childElementCount >= TOKENS_OF_A_BLOCK) block = null;
  });
  box.addEventListener("click", (event) => {
    const { token } = event.target.dataset;
    if (token !== undefined) choose(Number(token));
  });
  return { box, tokens, text: panel.pieces.join("").toLowerCase(), starts: startsOf(panel.pieces) };
}

function startsOf(pieces) {
  let at = 0;
  return pieces.map((piece) => {
    const start = at;
    at += piece.length;
    return start;
  });
}

// Of each way in which a token may be held, by its place in `formats`: apart from one another, the more bits the stronger.
function strengthOf(panel, format) {
  return STRENGTHS - Math.round((format * (STRENGTHS - 2)) / panel.formats.length);
}

// From 0, for what is gone, to STRENGTHS.
function strengthsOf(panel, state) {
  if (state.cell === null) {
    const holders = holdersOf(panel, state.moment), heads = panel.cells.length;
    return Array.from(holders, (count) => Math.ceil((STRENGTHS * count) / heads));
  }
  const byFormat = [0, ...panel.formats.map((_, format) => strengthOf(panel, format))];
  return Array.from(heldBy(panel, state.moment, state.cell), (how) => byFormat[how]);
}

// What the marks of the text mean.
function fillKey(element, panel, state) {
  const sample = (strength, words) => {
    const item = document.createElement("span");
    item.className = `s${strength}`;
    item.textContent = words;
    return item;
  };
  const several = [[STRENGTHS, "held by all heads"], [STRENGTHS / 2, "by half"], [1, "by few"], [0, "by none"]];
  const formats = panel.formats.map(({ name }, format) => [strengthOf(panel, format), name]).filter((_, f) => panel.used.includes(f));
  const samples = state.cell === null ? several : [...formats, [0, "gone"]];
  element.replaceChildren(...samples.map(([strength, words]) => sample(strength, words)));
}

function paintText(view, panel, state, places) {
  const strengths = strengthsOf(panel, state), { seen } = panel.moments[state.moment];
  const found = new Set(places.flatMap(({ tokens }) => tokens)), here = new Set(places[state.place]?.tokens);
  view.tokens.forEach((span, token) => {
    let name = token < seen ? `s${strengths[token]}` : "later";
    if (found.has(token)) name += " found";
    if (here.has(token)) name += " here";
    if (state.token === token) name += " chosen";
    if (span.className !== name) span.className = name;
  });
}

// Where the words are: of each place, its tokens.
function placesOf(view, words) {
  const wanted = words.toLowerCase(), places = [];
  if (!wanted) return places;
  let token = 0;
  for (let at = view.text.indexOf(wanted); at >= 0; at = view.text.indexOf(wanted, at + wanted.length)) {
    const end = at + wanted.length, tokens = [];
    while (token + 1 < view.starts.length && view.starts[token + 1] <= at) token++;
    for (let next = token; next < view.starts.length && view.starts[next] < end; next++) tokens.push(next);
    places.push({ tokens });
  }
  return places;
}

function tokenInWords(panel, state) {
  const total = panel.pieces.length, by = panel.formats.map(() => 0);
  if (state.token >= total) return "";
  for (let cell = 0; cell < panel.cells.length; cell++) {
    const how = panel.held[state.moment][cell * total + state.token];
    if (how !== GONE) by[how - 1]++;
  }
  const holding = by.reduce((sum, count) => sum + count, 0);
  const ways = panel.formats.map(({ name }, i) => (by[i] ? `${by[i]} as ${name}` : "")).filter(Boolean);
  const piece = JSON.stringify(panel.pieces[state.token]), detail = ways.length ? ` (${ways.join(", ")})` : "";
  return `Token ${number(state.token)}, ${piece}: held by ${holding} of ${panel.cells.length} heads${detail}`;
}
