// The page: a header, a tab for each comparison, and in it the table, the charts and the runs.

function header() {
  const seeds = unique(data.sections.flatMap((section) => section.runs.map((run) => run.seed))).sort((a, b) => a - b);
  const methods = unique(data.sections.flatMap((section) => section.methods.map((method) => method.label)));
  const run = seeds.length > 6 ? `${seeds.length} seeds` : `seed${seeds.length > 1 ? "s" : ""} ${seeds.join(", ")}`;
  const facts = [plural(methods.length, "method"), plural(data.count, "run"), run];
  if (data.sections.length === 1) facts.push(...factsOf(data.sections[0]).filter((text) => text !== data.title));
  const parts = [el("ul", { class: "facts" }, ...facts.map((text) => el("li", { text })))];
  if (data.sections.length > 1) {
    parts.push(el("ul", { class: "answers", "aria-label": "Answers" }, ...data.sections.map((section) =>
      el("li", {}, el("a", { href: `#${section.id}`, text: section.name }), el("span", { text: `${section.verdict}.` })))));
  }
  if (data.problems.length) {
    parts.push(el("div", { class: "problems", role: "note" },
      el("p", { text: `${plural(data.problems.length, "record")} could not be read and ${data.problems.length === 1 ? "is" : "are"} missing here:` }),
      el("ul", {}, ...data.problems.map((text) => el("li", { text })))));
  }
  if (data.thinned) parts.push(el("p", { class: "note", text: data.thinned }));
  return parts;
}

const factsOf = (section) => unique([section.title, imagesOf(section)]);

function imagesOf(section) {
  return section.kind === "memorization" ? "training images" : `${section.split} images`;
}

function panel(section) {
  section.view = new Methods(section);
  const federated = section.kind.startsWith("federated");
  const bold = section.scores.some((score) => known(score.best))
    ? "Scores that are shares are in per cent; bold: the best mean, where its paired interval to every other method leaves out 0."
    : "Scores that are shares are in per cent; no mean is bold: these seeds tell no method from all others.";
  const caption = el("div", { class: "caption" }, ...[...section.caption, bold].map((text) => el("p", { text })), ...section.notes.map((text) => el("p", { class: "of-data", text })));
  const table = new ComparisonTable(section).element();
  const parts = [
    data.sections.length > 1 ? el("h2", { text: section.name }) : null,
    data.sections.length > 1 ? el("ul", { class: "facts" }, ...factsOf(section).map((text) => el("li", { text }))) : null,
    section.about ? el("p", { class: "about", text: section.about }) : null,
    el("p", { class: "verdict", text: `${section.verdict}.` }),
    el("nav", { class: "contents", "aria-label": "On this page" }),
    section.view.bar(),
    el("section", { class: "block first", id: `${section.id}-comparison`, "aria-label": "Comparison" }, table, headlineChart(section), caption),
    sweepBlock(section),
  ];
  if (section.kind !== "memorization") {
    parts.push(curvesBlock(section, "learning", "Learning curves", null), matrixBlock(section), forgettingBlock(section));
  }
  parts.push(evaluationBlock(section));
  if (!federated) parts.push(curvesBlock(section, "plasticity", "Plasticity", "Whether the network can still learn: how well it fits each experience when that is the newest, and what has become of its units."));
  parts.push(layersBlock(section));
  if (federated) parts.push(rolesBlock(section));
  parts.push(runsBlock(section));
  const panel = el("div", { id: section.id, class: "panel" }, ...parts.filter(Boolean));
  stuck.observe(panel.querySelector(".methods"));
  const blocks = [...panel.querySelectorAll(":scope > section")];
  panel.querySelector(".contents").append(...blocks.map((each) =>
    el("a", { href: `#${each.id}`, text: each.querySelector("h3")?.textContent ?? each.getAttribute("aria-label") })));
  return panel;
}

const panels = new Map();

/** The bar of methods stays at the top: what an address leads to comes to lie under it. */
const stuck = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const height = target.tagName === "DETAILS" && target.open ? 0 : target.offsetHeight;
    if (height) document.documentElement.style.setProperty("--stuck", `${height}px`);
  }
});

/** Make a tab's panel when it is first asked for, and show it alone. */
function open(section) {
  for (const [id, { tab, holder }] of panels) {
    const chosen = id === section.id;
    holder.hidden = !chosen;
    tab?.setAttribute("aria-selected", String(chosen));
    if (tab) tab.tabIndex = chosen ? 0 : -1;
  }
  const { holder } = panels.get(section.id);
  if (!holder.firstChild) holder.append(panel(section));
}

function tabs() {
  const list = el("div", { class: "tabs", role: "tablist", "aria-label": "Comparisons" });
  data.sections.forEach((section, number) => {
    const tab = el("button", { type: "button", role: "tab", id: `tab-${section.id}`, "aria-controls": `panel-${section.id}`, text: section.name });
    tab.addEventListener("click", () => visit(section));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = data.sections[(number + step + data.sections.length) % data.sections.length];
      visit(next);
      panels.get(next.id).tab.focus();
    });
    panels.get(section.id).tab = tab;
    list.append(tab);
  });
  return list;
}

/** Open a tab, and let the address say so: the browser's back button closes it again. */
function visit(section) {
  open(section);
  if (location.hash !== `#${section.id}`) history.pushState(null, "", `#${section.id}`);
}

/** Return the section that an address within the page is in; of two that could be it, the one with the longer name. */
function sectionAt(id) {
  const within = data.sections.filter((each) => id === each.id || id.startsWith(`${each.id}-`) || each.runs.some((run) => run.id === id));
  return within.sort((a, b) => Number(b.runs.some((run) => run.id === id)) - Number(a.runs.some((run) => run.id === id)) || b.id.length - a.id.length)[0];
}

/** Open what an address within the page names, and go there. */
function goTo(id) {
  const section = sectionAt(id);
  if (!section) return;
  if (id === section.id) return visit(section);
  open(section);
  const target = document.getElementById(id);
  if (!target) return;
  if (target.tagName === "DETAILS") target.open = true;
  if (location.hash !== `#${id}`) history.pushState(null, "", `#${id}`);
  target.scrollIntoView({ block: "start" });
  target.querySelector("summary")?.focus({ preventScroll: true });
}

function start() {
  const main = document.getElementById("main");
  main.append(...header());
  for (const section of data.sections) {
    const several = data.sections.length > 1;
    panels.set(section.id, { holder: el("div", { id: `panel-${section.id}`, role: several ? "tabpanel" : null, "aria-labelledby": several ? `tab-${section.id}` : null }) });
  }
  if (data.sections.length > 1) main.append(tabs());
  main.append(...[...panels.values()].map(({ holder }) => holder));
  startTheme();
  open(data.sections[0]);
  const followHash = () => (location.hash.length > 1 ? goTo(decodeURIComponent(location.hash.slice(1))) : open(data.sections[0]));
  window.addEventListener("hashchange", followHash);
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#run-']");
    if (!link) return;
    event.preventDefault();
    goTo(link.getAttribute("href").slice(1));
  });
  followHash();
}

start();
