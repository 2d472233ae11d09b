// Accuracy against a setting that has several values: a line a method, intervals on it.

function sweepBlock(section) {
  const score = section.scores.find((each) => each.key === section.headline);
  if (!section.sweeps.length || !score) return null;
  const parent = block(`${section.id}-sweep`, "Against what was varied", "The first score against a setting of which a method has several values. Where several rows have one value, the best of them is on the line.");
  let sweep = section.sweeps[0];
  const chart = new Chart("", () => sweepOf(section, sweep, score));
  chart.title.hidden = true;
  const named = () => chart.plot.setAttribute("aria-label", `${score.label} against ${sweep.label}`);
  named();
  const options = section.sweeps.map((each, number) => [number, each.label]);
  const controls = el("div", { class: "controls" }, picker("setting", options, 0, (number) => {
    sweep = section.sweeps[number];
    named();
    chart.changed();
  }));
  section.view.listeners.push(() => chart.changed());
  parent.append(controls, chart.figure);
  return parent;
}

/** Return, for each group of rows that are shown, its best row by value: [group, [[value, index], ...]]. */
function swept(section, sweep, score) {
  const groups = new Map();
  for (const index of section.view.shown) {
    const [value, found] = [sweep.values[index], section.methods[index].scores[score.key]];
    if (!known(value) || !found) continue;
    const group = section.methods[index].kin[0];
    if (!groups.has(group)) groups.set(group, new Map());
    const best = groups.get(group).get(value);
    if (best === undefined || found[1] > section.methods[best].scores[score.key][1]) groups.get(group).set(value, index);
  }
  return [...groups].map(([group, line]) => [group, [...line].sort((a, b) => a[0] - b[0])]);
}

function sweepOf(section, sweep, score) {
  if (!section.view.shown.length) return NONE_CHOSEN;
  const times = score.percent ? 100 : 1;
  const lines = swept(section, sweep, score);
  if (!lines.some(([, line]) => line.length > 1)) return "None of the methods chosen has several values of this setting.";
  const traces = lines.map(([group, line]) => {
    const found = line.map(([, index]) => section.methods[index].scores[score.key]);
    const first = line[0][1];
    const slot = section.view.slots.get(first) ?? 0;
    return {
      x: line.map(([value]) => value),
      y: found.map(([, value]) => times * value),
      error_y: {
        type: "data",
        array: found.map(([, value, , , high]) => (known(high) ? times * (high - value) : 0)),
        arrayminus: found.map(([, value, , low]) => (known(low) ? times * (value - low) : 0)),
        color: section.view.hue(first),
        thickness: 1.6,
        width: 4,
      },
      name: plain(section.groups[group]),
      mode: "lines+markers",
      line: { color: section.view.hue(first), width: 2.2, dash: DASHES[slot % DASHES.length] },
      marker: { color: section.view.hue(first), symbol: SYMBOLS[slot % SYMBOLS.length], size: 9 },
      text: found.map(([n, value, , low, high], i) => `${show(value, score.percent)}${known(low) ? ` ${ends(low, high, score.percent)}` : ""}, n = ${n}: ${plain(section.methods[line[i][1]].label)}`),
      hovertemplate: "%{text}<extra></extra>",
      meta: "mean",
    };
  });
  const values = unique(lines.flatMap(([, line]) => line.map(([value]) => value))).sort((a, b) => a - b);
  const log = values[0] > 0 && values[values.length - 1] >= 10 * values[0];
  const layout = {
    xaxis: { title: { text: plain(sweep.label) }, type: log ? "log" : "linear", tickvals: values, ticktext: values.map(significant) },
    yaxis: { title: { text: plain(score.label) + (score.percent ? " (%)" : "") } },
    showlegend: true,
    legend: { orientation: "h", y: -0.25 },
    hovermode: "closest",
  };
  return { traces, layout, height: narrow() ? 340 : 400, note: "Bars: intervals of the mean over seeds, as in the table; none where there is one seed." };
}
