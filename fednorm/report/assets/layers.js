// The normalization view: drift of statistics, weight norm and effective learning rate, per layer and over time.

const MEASURES = {
  drift: {
    label: "drift of the running statistics",
    unit: "joint standard deviations",
    pool: mean,
    pooled: "mean over layers",
    log: false,
    federated: "How far each client's running statistics are, after its training, from those of all clients pooled: the Wasserstein distance of the two normal distributions, in pooled standard deviations.",
    continual: "How far the running statistics are from those of all the data seen so far: the Wasserstein distance of the two normal distributions, in standard deviations of that data.",
  },
  weight_norm: {
    label: "weight norm",
    unit: "Frobenius norm",
    pool: geometricMean,
    pooled: "geometric mean over layers",
    log: true,
    about: "The Frobenius norm of each convolution's and linear layer's weight. Before a normalization it changes nothing but the effective learning rate.",
  },
  effective_learning_rate: {
    label: "effective learning rate",
    unit: "effective learning rate",
    pool: geometricMean,
    pooled: "geometric mean over layers",
    log: true,
    about: "The learning rate that the direction of a weight feels: rate / norm² with SGD, rate / norm with Adam.",
  },
};

/** Return how a measure stands in a run for one layer (null: pooled) and one domain (null: mean): [times, values]. */
function measured(run, measure, layer, domain) {
  const table = run.layers[measure];
  if (!table) return null;
  const layers = data.layers[table.layers];
  const slices = table.domains ? table.values.filter((_, i) => domain === null || table.domains[i] === domain) : [table.values];
  if (!slices.length || (layer !== null && !layers.includes(layer))) return null;
  const rows = layer === null ? upTo(layers.length) : [layers.indexOf(layer)];
  const { pool } = MEASURES[measure];
  const xs = data.times[table.times];
  return [xs, xs.map((_, t) => pool(rows.map((row) => mean(slices.map((slice) => slice[row][t])))))];
}

function layersBlock(section) {
  const parent = block(`${section.id}-layers`, "Inside the normalization", null);
  const offered = Object.keys(MEASURES).filter((measure) => section.runs.some((run) => run.layers[measure]));
  if (!offered.length) {
    parent.append(el("p", { class: "absent", text: "These records keep no diagnostics (drift of statistics, weight norm, effective learning rate): they are summaries, or were made by a fednorm that did not measure them." }));
    return parent;
  }
  const state = { measure: offered[0], layer: null, domain: null, across: "time" };
  const about = el("p", { class: "about" });
  const controls = el("div", { class: "controls" });
  const overTime = new Chart("", () => overTimeOf(section, state));
  const perLayer = new Chart("", () => perLayerOf(section, state, (layer) => change({ layer })));
  const withMeasure = () => section.runs.filter((run) => run.layers[state.measure]);
  const chosen = picker("layer by layer, of", [], "", (value) => change({ method: Number(value) }));

  const change = (values) => {
    Object.assign(state, values);
    if ("measure" in values) offer();
    const select = controls.querySelector("[data-layer] select");
    if (select) select.value = state.layer ?? "";
    const { label } = MEASURES[state.measure];
    overTime.title.textContent = `${label}, ${state.layer ?? MEASURES[state.measure].pooled}`;
    overTime.plot.setAttribute("aria-label", overTime.title.textContent);
    perLayer.plot.setAttribute("aria-label", `${label} by layer of ${section.methods[state.method].label}`);
    overTime.changed();
    perLayer.changed();
  };
  const offer = () => {
    const measure = MEASURES[state.measure];
    about.textContent = measure.about ?? measure[section.kind === "federated" ? "federated" : "continual"];
    const runs = withMeasure();
    const layers = unique(runs.flatMap((run) => data.layers[run.layers[state.measure].layers]));
    const domains = unique(runs.flatMap((run) => run.layers[state.measure].domains ?? []));
    const methods = byHeadline(section).filter((index) => runs.some((run) => run.method === index));
    Object.assign(state, { layer: null, domain: null, across: "time", method: methods.includes(state.method) ? state.method : methods[0] });
    const select = chosen.querySelector("select");
    select.replaceChildren(...methods.map((index) => el("option", { value: index, text: section.methods[index].label })));
    select.value = state.method;
    const layer = picker("layer", [["", measure.pooled], ...layers.map((name) => [name, name])], "", (value) => change({ layer: value || null }));
    layer.dataset.layer = "";
    controls.replaceChildren(controls.firstChild, layer);
    if (domains.length) {
      controls.append(picker("clients of", [["", "every domain (mean)"], ...domains.map((name) => [name, name])], "", (value) => change({ domain: value || null })));
      controls.append(picker("layers against", [["time", "rounds"], ["domains", "domains, last round"]], "time", (across) => change({ across })));
    }
  };
  controls.append(picker("measure", offered.map((measure) => [measure, MEASURES[measure].label]), state.measure, (measure) => change({ measure })));
  perLayer.title.append(chosen);
  change({ measure: state.measure });
  section.view.listeners.push(() => overTime.changed());
  parent.append(about, controls, el("div", { class: "pair" }, overTime.figure, perLayer.figure));
  return parent;
}

function overTimeOf(section, { measure, layer, domain }) {
  if (!section.view.shown.length) return NONE_CHOSEN;
  const traces = [];
  const seeds = [];
  const without = [];
  for (const index of section.view.shown) {
    const curves = runsOf(section, index).map((run) => measured(run, measure, layer, domain)).filter(Boolean);
    if (!curves.length) {
      without.push(section.methods[index].label);
      continue;
    }
    seeds.push(curves.length);
    const curve = overSeeds(curves, section.quantiles, null);
    traces.push(...curveTraces(section.methods[index].label, section.view.style(index), curve, curve.mean.map((value) => show(value, false)), section.view.shown.length > 4));
  }
  const lacking = without.length ? `Not measured: ${without.join("; ")}${measure === "drift" ? " (no running statistics there)" : ""}.` : "";
  if (!traces.length) return lacking;
  const layout = {
    xaxis: countAxis(traces, IN_TURN[section.kind]),
    yaxis: { title: { text: MEASURES[measure].unit }, ...(MEASURES[measure].log ? { type: "log", dtick: null, nticks: 6, tickformat: "~g" } : { rangemode: "tozero" }) },
    hovermode: "x unified",
  };
  return { traces, layout, height: narrow() ? 320 : 400, note: [bandNote(seeds), lacking].filter(Boolean).join(" ") };
}

function perLayerOf(section, { measure, method, domain, across }, choose) {
  const runs = runsOf(section, method).filter((run) => run.layers[measure]);
  if (!runs.length) return "This method has no such measurement.";
  const table = runs[0].layers[measure];
  const layers = data.layers[table.layers];
  const byDomain = across === "domains" && table.domains;
  const times = data.times[table.times];
  const last = times.length - 1;
  const columns = byDomain ? table.domains : times.map(String);
  const curve = (layer, at) => runs.map((run) => measured(run, measure, layer, at)?.[1]);
  const values = layers.map((layer) => {
    if (byDomain) return columns.map((name) => mean(curve(layer, name).map((ys) => ys?.[last])));
    const curves = curve(layer, domain);
    return columns.map((_, t) => mean(curves.map((ys) => ys?.[t])));
  });
  const where = (j) => (byDomain ? plain(columns[j]) : `${IN_TURN[section.kind]} ${columns[j]}`);
  const { trace, layout } = heatMap({
    rows: layers.map(plain),
    columns: columns.map(plain),
    values,
    hover: values.map((row, i) => row.map((value, j) => `${plain(layers[i])}<br>${where(j)}: ${show(value, false)}`)),
    title: MEASURES[measure].unit,
    log: MEASURES[measure].log,
  });
  layout.xaxis.title = { text: byDomain ? "" : IN_TURN[section.kind] };
  layout.yaxis.tickfont = { size: layers.length > 24 ? 10 : 11.5 };
  const seeds = runs.length > 1 ? `Mean over ${runs.length} seeds.` : "One seed.";
  return { traces: [trace], layout, height: Math.max(narrow() ? 320 : 400, 110 + 17 * layers.length), note: `${seeds} Click a row to follow that layer.`, clicked: (point) => choose(layers[point.y]) };
}
