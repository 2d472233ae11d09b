// The first chart: a dot and an interval for each method, its seeds as small rings, best on top.

function headlineChart(section) {
  let key = section.headline;
  const named = (wanted) => section.scores.find((score) => score.key === wanted);

  const chart = new Chart("", () => {
    const score = named(key);
    const shown = byHeadline(section, key).filter((index) => section.view.has(index) && section.methods[index].scores[key]);
    if (!shown.length) return NONE_CHOSEN;
    return { ...dots(section, shown, score), height: 64 + Math.max(120, shown.length * rowHeight(section, shown)) };
  });
  chart.title.append(scorePicker(section, key, (value) => {
    key = value;
    chart.plot.setAttribute("aria-label", `${named(key).label} by method`);
    chart.changed();
  }));
  chart.plot.setAttribute("aria-label", `${named(key)?.label} by method`);
  section.view.listeners.push(() => chart.changed());
  return chart.figure;
}

function scorePicker(section, key, changed) {
  const options = section.scores.map((score) => [score.key, score.label, score.key.startsWith("per_domain.") ? "Domain" : "All"]);
  return picker("score", options, key, changed);
}

const LABEL = () => (narrow() ? 18 : 24);

function rowHeight(section, shown) {
  const lines = Math.max(...shown.map((index) => wrapped(section.methods[index].label, LABEL()).split("<br>").length));
  return 22 + 16 * lines;
}

function dots(section, shown, score) {
  const times = score.percent ? 100 : 1;
  const traces = [];
  let intervals = false;
  shown.forEach((index, row) => {
    const method = section.methods[index];
    const style = section.view.style(index);
    const [n, value, , low, high] = method.scores[score.key];
    const runs = runsOf(section, index).filter((run) => known(run.final[score.key]));
    if (n > 1) {
      traces.push({
        x: runs.map((run) => times * run.final[score.key]),
        y: runs.map(() => row + 0.26),
        mode: "markers",
        marker: { symbol: "circle-open", size: 6, color: style.colour, opacity: 0.75 },
        customdata: runs.map((run) => run.id),
        text: runs.map((run) => `seed ${run.seed}: ${show(run.final[score.key], score.percent)}`),
        hovertemplate: "%{text}<extra></extra>",
      });
    }
    const spread = known(low) ? `<br>interval ${ends(low, high, score.percent)}, n = ${n}` : "";
    intervals ||= known(low);
    traces.push({
      x: [times * value],
      y: [row],
      mode: "markers",
      marker: { symbol: style.symbol, size: 12, color: style.colour },
      error_x: known(low)
        ? { type: "data", array: [times * (high - value)], arrayminus: [times * (value - low)], color: style.colour, thickness: 2.2, width: 5 }
        : undefined,
      customdata: n === 1 && runs.length === 1 ? [runs[0].id] : [null],
      text: [`${plain(method.label)}: ${show(value, score.percent)}${spread}`],
      hovertemplate: "%{text}<extra></extra>",
    });
    const paper = method.paper[score.key];
    if (paper) {
      traces.push({
        x: [times * paper.value],
        y: [row],
        mode: "markers",
        marker: { symbol: "line-ns-open", size: 16, color: ink("--ink"), line: { width: 2 } },
        text: [`paper: ${show(paper.value, score.percent)} (${plain(paper.source)})`],
        hovertemplate: "%{text}<extra></extra>",
      });
    }
  });
  const baseline = section.methods.find((method) => method.label === section.baseline)?.scores[score.key]?.[1];
  const rule = { type: "line", yref: "paper", y0: 0, y1: 1, line: { color: ink("--muted"), width: 1, dash: "dot" } };
  const layout = {
    xaxis: { title: { text: plain(score.label) + (score.percent ? " (%)" : "") }, nticks: 6 },
    yaxis: {
      tickvals: shown.map((_, row) => row),
      ticktext: shown.map((index) => wrapped(section.methods[index].label, LABEL())),
      range: [shown.length - 0.4, -0.6],
      tickfont: { color: ink("--ink"), size: 13 },
      ticklen: 0,
      showgrid: false,
    },
    shapes: known(baseline) ? [{ ...rule, x0: times * baseline, x1: times * baseline }] : [],
    hovermode: "closest",
    dragmode: false,
  };
  return { traces, layout, note: dotsNote(section, intervals, baseline, traces), clicked: (point) => point.customdata && goTo(point.customdata) };
}

function dotsNote(section, intervals, baseline, traces) {
  const said = [];
  if (intervals) {
    const { level, method } = section.methods.find((each) => each.interval).interval;
    said.push(`Mark: mean; bar: ${Math.round(100 * level)} % interval (${method}); rings: seeds.`);
  } else said.push("One seed a method: no interval can be given.");
  if (known(baseline)) said.push(`Dotted line: ${section.baseline}.`);
  if (traces.some((trace) => trace.marker.symbol === "line-ns-open")) said.push("Upright stroke: the paper's number.");
  return said.join(" ");
}
