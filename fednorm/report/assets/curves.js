// Learning and plasticity: a line and a band over seeds for each method, of whichever quantity is picked.

const IN_TURN = { federated: "round", continual: "experience", memorization: "experience", federated_continual: "experience" };

function curvesBlock(section, view, heading, about) {
  const offered = section.quantities.filter((quantity) => quantity.view === view);
  const id = `${section.id}-${view}`;
  const parent = block(id, heading, about);
  if (!offered.length) {
    parent.append(el("p", { class: "absent", text: "These records keep no curves: a summary keeps the final numbers only." }));
    return parent;
  }
  const state = { key: offered[0].key, axis: "turn" };
  const chart = new Chart("", () => curvesOf(section, offered.find((quantity) => quantity.key === state.key), state.axis));
  chart.title.hidden = true;
  const named = () => chart.plot.setAttribute("aria-label", `${offered.find((quantity) => quantity.key === state.key).label} by ${IN_TURN[section.kind]}`);
  named();
  const update = (change) => {
    Object.assign(state, change);
    named();
    chart.changed();
  };
  const groups = unique(offered.map((quantity) => quantity.group));
  const options = offered.map((quantity) => [quantity.key, quantity.label, groups.length > 1 ? quantity.group : null]);
  const what = groups.includes("Domain") ? "domain or score" : groups.includes("Experience") ? "experience or score" : "quantity";
  const controls = el("div", { class: "controls" }, picker(what, options, state.key, (key) => update({ key })));
  if (section.runs.some((run) => run.bytes)) {
    controls.append(picker("against", [["turn", "rounds"], ["bytes", "bytes sent"]], state.axis, (axis) => update({ axis })));
  }
  section.view.listeners.push(() => chart.changed());
  if (section.kind === "federated" && !groups.includes("Domain")) {
    parent.append(el("p", { class: "absent", text: "Accuracy by domain over rounds is not in these records; a summary keeps the mean over domains. The table has each domain after the last round." }));
  }
  parent.append(controls, chart.figure);
  return parent;
}

function curvesOf(section, quantity, axis) {
  if (!section.view.shown.length) return NONE_CHOSEN;
  const times = quantity.percent ? 100 : 1;
  const traces = [];
  const seeds = [];
  for (const index of section.view.shown) {
    const curves = runsOf(section, index)
      .filter((run) => run.series[quantity.key])
      .map((run) => {
        const [grid, values] = run.series[quantity.key];
        const scale = axis === "bytes" ? run.bytes : 1;
        return [data.grids[grid].map((x) => x * scale), values.map((value) => (known(value) ? times * value : null))];
      });
    if (!curves.length) continue;
    seeds.push(curves.length);
    const curve = overSeeds(curves, section.quantiles, quantity.percent ? [quantity.key === "forgetting" ? -100 : 0, 100] : null);
    const label = section.methods[index].label;
    const text = curve.mean.map((value, i) => {
      const band = curve.n > 1 ? ` ${ends(curve.low[i] / times, curve.high[i] / times, quantity.percent)}` : "";
      return show(value / times, quantity.percent) + band;
    });
    traces.push(...curveTraces(label, section.view.style(index), curve, text, section.view.shown.length > 4));
  }
  if (!traces.length) return "None of the methods chosen has this curve in its records.";
  const turn = IN_TURN[section.kind];
  const layout = {
    xaxis: axis === "bytes"
      ? { title: { text: narrow() ? "bytes sent" : "bytes sent, both ways, all clients (rounds × mean a round)" }, tickformat: "~s", ticksuffix: "B" }
      : countAxis(traces, turn),
    yaxis: { title: { text: wrapped(quantity.label + (quantity.percent ? " (%)" : ""), narrow() ? 26 : 44) } },
    hovermode: "x unified",
  };
  return { traces, layout, height: narrow() ? 340 : 420, note: bandNote(seeds) };
}

function bandNote(seeds) {
  if (seeds.every((n) => n === 1)) return "One seed a method: no band.";
  const [few, most] = [Math.min(...seeds), Math.max(...seeds)];
  const kinds = [most > 2 ? "95 % t interval" : null, seeds.includes(2) ? `lowest to highest seed${most > 2 ? " where n = 2" : ""}` : null];
  const said = `Line: mean over n = ${few < most ? `${few} to ` : ""}${most} seeds; band: ${kinds.filter(Boolean).join(", ")}.`;
  return few === 1 ? `${said} A method with one seed has no band.` : said;
}
