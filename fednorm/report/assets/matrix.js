// Heat maps of accuracy: a stream's accuracy matrix, and a federated run's evaluation matrix.

/** Offer the runs of one method, and the mean over them where there are several. */
function methodAndSeed(section, runs, changed) {
  const state = {};
  const holder = el("div", { class: "controls" });
  const indices = unique(runs.map((run) => run.method)).sort((a, b) => byHeadline(section).indexOf(a) - byHeadline(section).indexOf(b));
  const choose = (index) => {
    const own = runs.filter((run) => run.method === index);
    state.runs = own;
    state.method = index;
    const options = [...(own.length > 1 ? [["all", `mean over ${own.length} seeds`]] : []), ...own.map((run) => [run.hash, `seed ${run.seed}`])];
    const seed = picker("seed", options, options[0][0], (value) => {
      state.runs = value === "all" ? own : own.filter((run) => run.hash === value);
      changed();
    });
    holder.replaceChildren(holder.firstChild, seed);
    changed();
  };
  holder.append(picker("method", indices.map((index) => [index, section.methods[index].label]), indices[0], (value) => choose(Number(value))));
  queueMicrotask(() => choose(indices[0]));
  return { state, holder };
}

function matrixBlock(section) {
  const runs = section.runs.filter((run) => run.matrix?.length > 1);
  if (!runs.length) return null;
  const parent = block(`${section.id}-matrix`, "Accuracy matrix", "Accuracy on each experience (column) after each one trained on (row). Below the diagonal is what was kept; above it are experiences still to come.");
  const chart = new Chart("", () => (state.runs ? accuracyMatrix(section, state.runs, of) : ""));
  chart.title.hidden = true;
  const of = { client: "mean", network: "sent" };
  const changed = () => {
    const who = of.client === "mean" ? "" : `, client ${of.client}`;
    chart.plot.setAttribute("aria-label", `Accuracy matrix of ${section.methods[state.method].label}${who}`);
    chart.changed();
  };
  const { state, holder } = methodAndSeed(section, runs, changed);
  parent.append(holder, ...clientAndNetwork(runs, of, changed), chart.figure);
  return parent;
}

/** Offer the clients of a grid and the mean over them, and the network that is scored; nothing for a plain stream. */
function clientAndNetwork(runs, of, changed) {
  const count = Math.max(0, ...runs.map((run) => run.clients?.sent.length ?? 0));
  if (!count) return [];
  const clients = [["mean", `mean over ${plural(count, "client")}`], ...upTo(count).map((client) => [String(client), `client ${client}`])];
  const networks = [["sent", "that the server sent"], ["own", "that the client had just trained"]];
  const chosen = (key) => (value) => {
    of[key] = value;
    changed();
  };
  return [el("div", { class: "controls" }, picker("client", clients, of.client, chosen("client")), picker("network", networks, of.network, chosen("network")))];
}

/** Return a run's accuracy matrix, or one of its clients'. */
function matrixOf(run, { client, network }) {
  if (!run.clients) return run.matrix;
  const own = run.clients[network];
  if (client !== "mean") return own[Number(client)] ?? [];
  return upTo(run.matrix.length).map((i) => upTo(run.matrix[0].length).map((j) => mean(own.map((matrix) => matrix[i][j]))));
}

function accuracyMatrix(section, runs, of) {
  const size = [runs[0].matrix.length, runs[0].matrix[0].length];
  const matrices = runs.map((run) => matrixOf(run, of));
  const values = upTo(size[0]).map((i) => upTo(size[1]).map((j) => mean(matrices.map((matrix) => matrix[i]?.[j]))));
  const title = (j) => section.experiences[j] || `experience ${j + 1}`;
  const small = size[1] <= (narrow() ? 6 : 12);
  const { trace, layout } = heatMap({
    rows: upTo(size[0]).map((i) => `after ${i + 1}`),
    columns: upTo(size[1]).map((j) => (small && !narrow() ? plain(title(j)) : String(j + 1))),
    values: values.map((row) => row.map((value) => (known(value) ? 100 * value : null))),
    texts: small ? values.map((row) => row.map((value) => (known(value) ? show(value, true) : ""))) : undefined,
    hover: values.map((row, i) => row.map((value, j) => `${plain(title(j))}<br>after experience ${i + 1}: ${show(value, true)} %`)),
    title: "accuracy (%)",
    range: [0, 100],
  });
  layout.xaxis.title = { text: "accuracy on experience" };
  layout.yaxis.title = { text: "after experience" };
  layout.yaxis.ticktext = upTo(size[0]).map((i) => String(i + 1));
  const height = Math.min(640, 110 + Math.max(26, 300 / size[0]) * size[0]);
  return { traces: [trace], layout, height, note: unseenNote(values) };
}

function unseenNote(values) {
  return values.some((row) => row.some((value) => !known(value))) ? "Blank: not evaluated." : "";
}

function evaluationBlock(section) {
  const runs = section.runs.filter((run) => run.evaluation);
  if (!runs.length) return null;
  const parent = block(`${section.id}-evaluation`, "Evaluation matrix", "The same networks under other statistics than their own: the accuracy on each domain (column) with each choice (row).");
  const chart = new Chart("", () => (state.runs ? evaluationMatrix(state.runs) : ""));
  chart.title.hidden = true;
  const { state, holder } = methodAndSeed(section, runs, () => {
    chart.plot.setAttribute("aria-label", `Evaluation matrix of ${section.methods[state.method].label}`);
    chart.changed();
  });
  parent.append(holder, chart.figure);
  return parent;
}

function evaluationMatrix(runs) {
  const rows = unique(runs.flatMap((run) => run.evaluation.map(([name]) => name)));
  const domains = unique(runs.flatMap((run) => run.evaluation.flatMap(([, scores]) => Object.keys(scores))));
  const at = (name, domain) => mean(runs.map((run) => run.evaluation.find(([own]) => own === name)?.[1][domain]));
  const values = rows.map((name) => domains.map((domain) => at(name, domain)));
  const { trace, layout } = heatMap({
    rows: rows.map((name) => wrapped(name, LABEL())),
    columns: domains.map(plain),
    values: values.map((row) => row.map((value) => (known(value) ? 100 * value : null))),
    texts: values.map((row) => row.map((value) => (known(value) ? show(value, true) : ""))),
    hover: values.map((row, i) => row.map((value, j) => `${plain(rows[i])}<br>${plain(domains[j])}: ${show(value, true)} %`)),
    title: "accuracy (%)",
    range: [0, 100],
  });
  return { traces: [trace], layout, height: 110 + 40 * rows.length, note: "" };
}
