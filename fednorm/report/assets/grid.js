// Federations whose clients learn on streams: what is forgotten over time against what aggregation takes.

function forgettingBlock(section) {
  if (!section.runs.some((run) => run.series.spatial && run.series.temporal)) return null;
  const about = "Across: what clients have forgotten of earlier experiences by then (best accuracy so far minus today's). Up: what the server's average has less than a client's own network, just trained. A point an experience, from the second on.";
  const parent = block(`${section.id}-forgetting`, "Spatial against temporal forgetting", about);
  const chart = new Chart("", () => forgettingOf(section));
  chart.title.hidden = true;
  chart.plot.setAttribute("aria-label", "Spatial against temporal forgetting");
  section.view.listeners.push(() => chart.changed());
  parent.append(chart.figure);
  return parent;
}

/** Return a run's curve as a map from the experience to its value. */
const byTime = (run, key) => new Map(run.series[key] ? data.grids[run.series[key][0]].map((x, i) => [x, run.series[key][1][i]]) : []);

function forgettingOf(section) {
  if (!section.view.shown.length) return NONE_CHOSEN;
  const traces = [];
  for (const index of section.view.shown) {
    const runs = runsOf(section, index).map((run) => ({ temporal: byTime(run, "temporal"), spatial: byTime(run, "spatial") }));
    const times = unique(runs.flatMap((run) => [...run.temporal.keys()])).sort((a, b) => a - b);
    const points = times
      .map((time) => ({ time, x: mean(runs.map((run) => run.temporal.get(time))), y: mean(runs.map((run) => run.spatial.get(time))) }))
      .filter(({ x, y }) => known(x) && known(y));
    if (!points.length) continue;
    const style = section.view.style(index);
    traces.push({
      x: points.map(({ x }) => 100 * x),
      y: points.map(({ y }) => 100 * y),
      name: plain(section.methods[index].label),
      mode: "lines+markers",
      line: { color: style.colour, width: 2.2, dash: style.dash },
      marker: { color: style.colour, symbol: style.symbol, size: 8 },
      text: points.map(({ time, x, y }) => `after experience ${time}: temporal ${show(x, true)}, spatial ${show(y, true)}`),
      hovertemplate: "%{text}",
      meta: "mean",
    });
  }
  if (!traces.length) return "None of the methods chosen has both in its records.";
  const layout = {
    xaxis: { title: { text: "temporal forgetting (%)" } },
    yaxis: { title: { text: "spatial forgetting (%)" }, zeroline: true },
    hovermode: "closest",
  };
  return { traces, layout, height: narrow() ? 340 : 420, note: "Means over seeds." };
}
