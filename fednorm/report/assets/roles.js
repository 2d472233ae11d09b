// What the federation does with each tensor, method by method, and the bytes that it costs.

const ROLES = {
  shared: { colour: "#56b4e9", says: "sent, averaged" },
  pooled: { colour: "#009e73", says: "sent, pooled by the law of total variance" },
  local: { colour: "#d55e00", says: "never leaves its client" },
  reset: { colour: "#999999", says: "set anew each round" },
};
const [KEY, LAYER, NORM, KIND, ROLE, SHAPE, BYTES] = upTo(7);

const planOf = (section, index) => {
  const run = runsOf(section, index).find((each) => known(each.plan));
  return run ? data.plans[run.plan] : null;
};

function rolesBlock(section) {
  const methods = [...section.methods.keys()].filter((index) => planOf(section, index));
  if (!methods.length) return null;
  const parent = block(`${section.id}-roles`, "What travels, what stays", "Each entry of the network's state has a role that follows from what it is, never from its name.");
  const used = Object.keys(ROLES).filter((role) => methods.some((index) => planOf(section, index).counts[role]));
  parent.append(rolesLegend(used), rolesTable(section, methods, used));
  if (!methods.some((index) => planOf(section, index).tensors.length)) {
    parent.append(el("p", { class: "absent", text: "Tensor by tensor, roles and bytes are not in these records: they were made before fednorm kept them." }));
    return parent;
  }
  const chart = new Chart("Every entry of the state, in the network's order", () => strip(section, methods.filter((index) => section.view.has(index) && planOf(section, index).tensors.length)));
  section.view.listeners.push(() => chart.changed());
  parent.append(chart.figure, tensorTable(section, methods.filter((index) => planOf(section, index).tensors.length)));
  return parent;
}

function rolesLegend(used) {
  const entries = used.map((role) => {
    const swatch = el("span", { class: "swatch", "aria-hidden": true, text: role[0].toUpperCase() });
    swatch.style.background = ROLES[role].colour;
    return el("li", {}, swatch, el("b", { text: role }), ` ${ROLES[role].says}`);
  });
  return el("ul", { class: "roles" }, ...entries);
}

function rolesTable(section, methods, used) {
  const head = el("tr", {}, el("th", { scope: "col", text: "method" }), ...used.map((role) => el("th", { scope: "col", text: role })), el("th", { scope: "col", text: "sent a round" }));
  const rows = methods.map((index) => {
    const plan = planOf(section, index);
    const cells = used.map((role) => {
      const cell = el("td", {}, el("span", { class: "number", text: plan.counts[role] ? plural(plan.counts[role], "tensor") : UNKNOWN }));
      if (plan.bytes && plan.counts[role]) cell.append(el("span", { class: "spread", text: bytes(plan.bytes[role] ?? 0) }));
      return cell;
    });
    const sent = plan.bytes_per_round ?? runsOf(section, index)[0].bytes;
    return el("tr", {}, el("th", { scope: "row", text: section.methods[index].label }), ...cells, el("td", {}, el("span", { class: "number", text: bytes(sent) })));
  });
  const note = el("p", { class: "note", text: "Bytes under a role: of one client's copy. Sent a round: both ways, all clients of a round." });
  return el("div", {}, el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Tensors and bytes by role" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))), note);
}

/** Return every key of several lists once, a key that the earlier lists lack right after the one it follows in its own. */
function interleaved(lists) {
  const keys = [];
  for (const list of lists) {
    list.forEach((key, i) => {
      if (!keys.includes(key)) keys.splice(i ? keys.indexOf(list[i - 1]) + 1 : 0, 0, key);
    });
  }
  return keys;
}

/** Return one strip of cells a method, a cell a tensor, coloured by its role. */
function strip(section, methods) {
  if (!methods.length) return NONE_CHOSEN;
  const keys = interleaved(methods.map((index) => planOf(section, index).tensors.map((tensor) => tensor[KEY])));
  const roles = Object.keys(ROLES);
  const at = methods.map((index) => new Map(planOf(section, index).tensors.map((tensor) => [tensor[KEY], tensor])));
  const cell = (tensor) => `${plain(tensor[KEY])}: <b>${tensor[ROLE]}</b><br>${plain(tensor[KIND])}${tensor[NORM] ? ` of ${plain(tensor[NORM])}` : ""}, ${tensor[SHAPE].join("×") || "scalar"}, ${bytes(tensor[BYTES])}`;
  const few = keys.length <= (narrow() ? 20 : 64);
  const each = (of) => at.map((tensors) => keys.map((key) => of(tensors.get(key))));
  const trace = {
    type: "heatmap",
    z: each((tensor) => (tensor ? roles.indexOf(tensor[ROLE]) : null)),
    x: upTo(keys.length),
    y: upTo(methods.length),
    zmin: -0.5,
    zmax: roles.length - 0.5,
    colorscale: roles.flatMap((role, i) => [[i / roles.length, ROLES[role].colour], [(i + 1) / roles.length, ROLES[role].colour]]),
    showscale: false,
    xgap: few ? 2 : 0.5,
    ygap: 6,
    hoverongaps: false,
    text: each((tensor) => (tensor && few ? tensor[ROLE][0].toUpperCase() : "")),
    texttemplate: few ? "%{text}" : undefined,
    textfont: { color: "#10151c", size: 10 },
    customdata: each((tensor) => (tensor ? cell(tensor) : "")),
    hovertemplate: "%{customdata}<extra></extra>",
  };
  const labels = methods.map((index) => section.methods[index].label);
  const layout = {
    xaxis: { showgrid: false, showticklabels: false, ticks: "", title: { text: plural(keys.length, "tensor") + (narrow() ? "" : ", from the first layer to the last") } },
    yaxis: { showgrid: false, tickvals: upTo(methods.length), ticktext: labels.map((label) => wrapped(label, LABEL())), autorange: "reversed", tickfont: { color: ink("--ink"), size: 13 } },
    dragmode: false,
  };
  const blank = trace.z.some((row) => row.includes(null)) ? "Blank: the method's network has no such tensor." : "";
  return { traces: [trace], layout, height: 70 + methods.length * Math.max(38, rowHeight(section, methods)), note: blank };
}

/** Return the list of all tensors of one method, made when it is opened. */
function tensorTable(section, methods) {
  const box = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Tensors of one method" });
  const fill = (index) => {
    const head = ["tensor", "layer's norm", "kind", "role", "shape", "bytes"].map((text) => el("th", { scope: "col", text }));
    const rows = planOf(section, index).tensors.map((tensor) =>
      el("tr", {},
        el("th", { scope: "row" }, el("code", { text: tensor[KEY] })),
        ...[tensor[NORM] || UNKNOWN, tensor[KIND], tensor[ROLE], tensor[SHAPE].join("×") || "scalar", bytes(tensor[BYTES])].map((text) => el("td", { text }))));
    box.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
  };
  const chosen = picker("method", methods.map((index) => [index, section.methods[index].label]), methods[0], (value) => fill(Number(value)));
  const details = el("details", {}, el("summary", { text: "Tensor by tensor" }), el("div", { class: "controls" }, chosen), box);
  details.addEventListener("toggle", () => details.open && !box.firstChild && fill(methods[0]));
  return details;
}
