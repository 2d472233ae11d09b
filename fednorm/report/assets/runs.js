// The runs: one line each, and inside, made when it is opened, its numbers and its whole configuration.

function runsBlock(section) {
  const parent = block(`${section.id}-runs`, "Runs", "Every number above comes from these. A run's identity is the hash of its configuration.");
  const items = section.runs.map((run) => runItem(section, run));
  const status = el("span", { class: "status", role: "status" });
  const filter = el("input", { type: "search", placeholder: "Filter runs", "aria-label": "Filter runs by method, seed or hash" });
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    items.forEach((item) => {
      item.hidden = !words.every(item.fits);
      shown += Number(!item.hidden);
    });
    status.textContent = words.length ? `${shown} of ${plural(items.length, "run")}` : "";
  });
  parent.append(el("div", { class: "controls" }, filter, status), el("div", { class: "runs" }, ...items));
  return parent;
}

function runItem(section, run) {
  const label = section.methods[run.method].label;
  const score = section.scores.find((each) => each.key === section.headline);
  const summary = el("summary", {},
    el("span", { class: "run-name", text: label }),
    el("span", { class: "run-seed", text: `seed ${run.seed}` }),
    el("span", { class: "run-score", text: score ? show(run.final[score.key], score.percent) : "" }),
    el("code", { text: run.hash }));
  const item = el("details", { class: "run", id: run.id }, summary);
  const [method, seed] = [label.toLowerCase(), String(run.seed)];
  item.fits = (word) => method.includes(word) || "seed".startsWith(word) || word === seed || (word.length > 3 && run.hash.startsWith(word));
  item.addEventListener("toggle", () => {
    if (item.open && item.children.length === 1) item.append(runDetails(section, run));
  });
  return item;
}

function runDetails(section, run) {
  const scores = section.scores.map((score) => [score.label, show(run.final[score.key], score.percent) + (score.percent && known(run.final[score.key]) ? " %" : "")]);
  const facts = [
    ["wall clock", duration(run.seconds)],
    ["parameters", known(run.parameters) ? run.parameters.toLocaleString("en") : UNKNOWN],
    ...(run.bytes ? [["sent a round", bytes(run.bytes)]] : []),
    ["scored on", imagesOf(section)],
  ];
  const config = data.configs[run.config].map((setting) => data.settings[setting]);
  const chosen = config.filter(([, , isDefault]) => !isDefault);
  const rest = config.filter(([, , isDefault]) => isDefault);
  return el("div", { class: "run-body" },
    run.folder ? recordLine(run) : null,
    el("div", { class: "lists" },
      list("Scores", scores),
      list("Run", facts),
      list("Configuration, where it is not the default", [["seed", String(run.seed)], ...chosen])),
    el("details", { class: "rest" }, el("summary", { text: `${rest.length} settings at their defaults` }), list(null, rest)));
}

/** Return where the run's record lies; a link that starts with ./ can be nothing but a path. */
function recordLine(run) {
  const name = el("code", { text: run.folder });
  const place = run.link ? el("a", { href: `./${run.link.split("/").map(encodeURIComponent).join("/")}/` }, name) : name;
  return el("p", { class: "record" }, "Record: ", place);
}

function list(heading, entries) {
  return el("div", {},
    heading ? el("h4", { text: heading }) : null,
    el("dl", {}, ...entries.flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value === "" ? "(empty)" : value })])));
}
