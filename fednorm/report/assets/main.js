// The page: a header, a tab for each comparison, and in it the table, the charts and the runs.

function header() {
  const seeds = unique(data.sections.flatMap((section) => section.runs.map((run) => run.seed))).sort((a, b) => a - b);
  const methods = unique(data.sections.flatMap((section) => section.methods.map((method) => method.label)));
  const run = seeds.length > 6 ? `${seeds.length} seeds` : `seed${seeds.length > 1 ? "s" : ""} ${seeds.join(", ")}`;
  const facts = [plural(methods.length, "method"), plural(data.count, "run"), run];
  if (data.sections.length === 1) facts.push(...unique([data.sections[0].title, imagesOf(data.sections[0])]).filter((text) => text !== data.title));
  const parts = [el("ul", { class: "facts" }, ...facts.map((text) => el("li", { text })))];
  parts.push(...data.about.map((text) => el("p", { class: "about", text })));
  if (data.problems.length) {
    parts.push(el("div", { class: "problems", role: "note" },
      el("p", { text: `${plural(data.problems.length, "record")} could not be read and ${data.problems.length === 1 ? "is" : "are"} missing here:` }),
      el("ul", {}, ...data.problems.map((text) => el("li", { text })))));
  }
  if (data.thinned) parts.push(el("p", { class: "note", text: data.thinned }));
  return parts;
}

function imagesOf(section) {
  return section.kind === "memorization" ? "training images" : `${section.split} images`;
}

function panel(section) {
  section.view = new Methods(section);
  const federated = section.kind.startsWith("federated");
  const bold = section.methods.length > 1 ? "Scores that are shares are in per cent; bold: the best mean of a column." : "Scores that are shares are in per cent.";
  const caption = el("div", { class: "caption" }, ...[...section.caption, bold].map((text) => el("p", { text })), ...section.notes.map((text) => el("p", { class: "of-data", text })));
  const table = new ComparisonTable(section).element();
  const parts = [
    data.sections.length > 1 ? el("h2", { text: section.title }) : null,
    section.view.bar(),
    el("section", { class: "block first", "aria-label": "Comparison" }, el("div", { class: "beside" }, headlineChart(section), table), caption),
  ];
  if (section.kind !== "memorization") {
    parts.push(curvesBlock(section, "learning", "Learning curves", null), matrixBlock(section));
  }
  parts.push(evaluationBlock(section));
  if (!federated) parts.push(curvesBlock(section, "plasticity", "Plasticity", "Whether the network can still learn: how well it fits each experience when that is the newest, and what has become of its units."));
  parts.push(layersBlock(section));
  if (federated) parts.push(rolesBlock(section));
  parts.push(runsBlock(section));
  return el("div", { id: section.id, class: "panel" }, ...parts.filter(Boolean));
}

const panels = new Map();

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
    const tab = el("button", { type: "button", role: "tab", id: `tab-${section.id}`, "aria-controls": `panel-${section.id}`, text: section.title });
    tab.addEventListener("click", () => open(section));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = data.sections[(number + step + data.sections.length) % data.sections.length];
      open(next);
      panels.get(next.id).tab.focus();
    });
    panels.get(section.id).tab = tab;
    list.append(tab);
  });
  return list;
}

/** Open what an address within the page names, and go there. */
function goTo(id) {
  const section = data.sections.find((each) => id === each.id || id.startsWith(`${each.id}-`) || each.runs.some((run) => id === `run-${run.hash}`));
  if (!section) return;
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
  const followHash = () => location.hash.length > 1 && goTo(decodeURIComponent(location.hash.slice(1)));
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
