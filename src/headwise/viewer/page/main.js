// Main: panels, and what is chosen in them -> the page, painted anew when something else is chosen.

const byId = (id) => document.getElementById(id);

const inSpan = (words) => Object.assign(document.createElement("span"), { textContent: words });

function makePanel(panel, choose) {
  const section = document.createElement("section");
  section.className = "panel";
  const part = (tag, name) => {
    const element = document.createElement(tag);
    element.className = name;
    return element;
  };
  const title = document.createElement("h2");
  title.textContent = panel.policy;
  const figures = part("p", "figures"), legend = part("div", "legend"), said = part("div", "said");
  const axis = part("div", "axis"), key = part("div", "legend key");
  said.setAttribute("aria-live", "polite");
  for (const layer of [panel.layers[0], panel.layers.at(-1)]) axis.append(inSpan(`layer ${layer}`));
  const grid = makeHeads(panel, choose.head), text = makeText(panel, choose.token);
  section.append(title, figures, legend, grid, axis, said, key, text.box);
  return { panel, section, figures, legend, grid, said, key, text, places: [], counts: [] };
}

function paintFigures(view, state) {
  const { panel } = view, moment = panel.moments[state.moment];
  const kept = view.counts.reduce((sum, { kept }) => sum + kept, 0) / (panel.cells.length * moment.seen);
  const attention = moment.attention.reduce((sum, share) => sum + share, 0) / moment.attention.length;
  view.figures.replaceChildren(
    ...[
      `${number(moment.seen)} tokens read`,
      `${percent(kept)} of the rows held`,
      `${bytesAsText(moment.allocated)} in place of ${bytesAsText(moment.full)} (${percent(moment.allocated / moment.full)})`,
      `${percent(attention)} of the attention held`,
    ].map(inSpan),
  );
}

function sentences(view, state) {
  const { panel, counts } = view, lines = [];
  if (state.cell !== null) lines.push(headInWords(panel, state, state.cell, counts));
  if (state.token !== null) lines.push(tokenInWords(panel, state));
  if (!lines.length) lines.push("All heads.");
  return lines.map((line) => Object.assign(document.createElement("p"), { textContent: line }));
}

function start(data) {
  const { panels } = data, rules = rulesOf(panels);
  const state = { moment: 0, by: "bytes", cell: null, token: null, find: "", place: 0 };
  const views = panels.map((panel) => makePanel(panel, { head: chooseHead, token: chooseToken }));
  const moments = Math.max(...panels.map((panel) => panel.moments.length));
  byId("what").textContent = `${data.model} on a prompt of ${number(panels[0].prompt)} tokens.`;
  byId("panels").replaceChildren(...views.map(({ section }) => section));
  for (const [name, { title }] of Object.entries(MEASURES)) byId("by").add(new Option(title, name));
  if (rules.length > 1) byId("by").add(new Option("rule", "rule"));
  byId("moment").max = moments - 1;
  byId("moment").disabled = moments < 2;

  function paint() {
    for (const view of views) {
      // An answer may be shorter than the other one.
      const { panel } = view, own = { ...state, moment: Math.min(state.moment, panel.moments.length - 1) };
      view.counts = countsOf(panel, own.moment);
      paintFigures(view, own);
      fillLegend(view.legend, panel, own, rules);
      paintHeads(view.grid, panel, own, view.counts, rules);
      view.said.replaceChildren(...sentences(view, own));
      fillKey(view.key, panel, own);
      paintText(view.text, panel, own, view.places);
    }
    const { seen } = panels[0].moments[Math.min(state.moment, panels[0].moments.length - 1)], more = seen - panels[0].prompt;
    byId("moment").value = state.moment;
    byId("moment-said").textContent = more ? `after ${number(more)} tokens of the answer` : "after the prompt";
    const places = views[0].places.length;
    byId("found").textContent = state.find ? (places ? `${state.place + 1} of ${places}` : "not found") : "";
  }

  function chooseHead(cell) {
    state.cell = state.cell === cell ? null : cell;
    paint();
  }

  function chooseToken(token) {
    state.token = state.token === token ? null : token;
    paint();
  }

  function show(token) {
    for (const { text } of views) text.tokens[token]?.scrollIntoView({ block: "center" });
  }

  function find(words) {
    Object.assign(state, { find: words, place: 0 });
    for (const view of views) view.places = placesOf(view.text, words);
    paint();
    if (views[0].places.length) show(views[0].places[0].tokens[0]);
  }

  function goOn(step) {
    const count = views[0].places.length;
    if (!count) return;
    state.place = (state.place + step + count) % count;
    paint();
    show(views[0].places[state.place].tokens[0]);
  }

  function look(moment) {
    state.moment = Math.min(moments - 1, Math.max(0, moment));
    paint();
  }

  function showAll() {
    Object.assign(state, { cell: null, token: null });
    byId("find").value = "";
    // So that the next key is one of the page's.
    byId("find").blur();
    find("");
  }

  byId("by").addEventListener("change", (event) => {
    state.by = event.target.value;
    paint();
  });
  byId("moment").addEventListener("input", (event) => look(Number(event.target.value)));
  byId("find").addEventListener("input", (event) => find(event.target.value));
  byId("clear").addEventListener("click", showAll);
  for (const { text } of views)
    text.box.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      state.token = Math.min(text.tokens.length - 1, Math.max(0, (state.token ?? -step) + step));
      paint();
      text.tokens[state.token].scrollIntoView({ block: "nearest" });
    });
  document.addEventListener("keydown", (event) => {
    const typing = event.target === byId("find");
    if (event.key === "Escape") showAll();
    else if (typing && event.key === "Enter") goOn(event.shiftKey ? -1 : 1);
    else if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    else if (event.key === "/") byId("find").focus();
    else if (event.key === "[") look(state.moment - 1);
    else if (event.key === "]") look(state.moment + 1);
    else return;
    event.preventDefault();
  });
  paint();
}

loadPanels().then(start, (error) => {
  byId("panels").textContent = `This page cannot be shown: ${error.message}. It needs a browser of 2023 or later.`;
  throw error;
});
