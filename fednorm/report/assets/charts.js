// Charts: drawn by Plotly once they come into view, and again when what they show has changed.

const charts = new Set();

let plotly = null;

/** Return Plotly. Its source lies in the page as text and is run after the first paint: tables do not wait for it. */
function loadPlotly() {
  plotly ??= new Promise((resolve) => {
    const run = () => {
      document.head.append(el("script", { text: document.getElementById("plotly").textContent }));
      resolve(window.Plotly);
    };
    const soon = () => requestAnimationFrame(() => setTimeout(run));
    if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", soon);
    else soon();
  });
  return plotly;
}

const inView = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      entry.target.chart.visible = entry.isIntersecting;
      if (entry.isIntersecting) entry.target.chart.draw();
    }
  },
  { rootMargin: "150px" },
);

class Chart {
  /** `build` returns {traces, layout, height, note}, or a sentence that says why there is nothing to draw. */
  constructor(title, build) {
    this.build = build;
    this.stale = true;
    this.visible = false;
    this.title = el("figcaption", { text: title });
    this.plot = el("div", { class: "plot", role: "img", "aria-label": title });
    this.note = el("p", { class: "note" });
    this.tools = pictureButtons(this);
    this.figure = el("figure", {}, this.title, this.plot, this.note, this.tools);
    this.figure.chart = this;
    charts.add(this);
    inView.observe(this.figure);
  }

  changed() {
    this.stale = true;
    if (this.visible) this.draw();
  }

  async draw() {
    if (!this.stale) return;
    this.stale = false;
    const built = this.build();
    if (typeof built === "string") {
      this.plot.hidden = true;
      this.tools.hidden = true;
      if (this.plot.data) window.Plotly.purge(this.plot);
      this.clickable = false;
      this.note.textContent = built;
      this.figure.dataset.drawn = "absent";
      return;
    }
    this.plot.hidden = false;
    this.tools.hidden = false;
    this.note.textContent = built.note ?? "";
    this.plot.style.height = `${built.height}px`;
    const Plotly = await loadPlotly();
    await Plotly.react(this.plot, built.traces, merged(baseLayout(built.height), built.layout), CONFIG);
    if (built.clicked && !this.clickable) {
      this.clickable = true;
      this.plot.on("plotly_click", (event) => built.clicked(event.points[0]));
    }
    this.figure.dataset.drawn = String(Number(this.figure.dataset.drawn ?? 0) + 1);
  }
}

function redrawAll() {
  for (const chart of charts) chart.changed();
}

const CONFIG = {
  responsive: true,
  showTips: false,
  displayModeBar: false, // its buttons cannot be reached with a keyboard, and one sends the chart to a server
};

function baseLayout(height) {
  const axis = {
    automargin: true,
    gridcolor: ink("--rule"),
    linecolor: ink("--rule"),
    zeroline: false,
    tickcolor: ink("--rule"),
    title: { standoff: 12 },
  };
  return {
    height,
    margin: { l: 8, r: 12, t: 8, b: 8, pad: 4 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: ink("--font"), size: 12.5, color: ink("--muted") },
    hoverlabel: {
      bgcolor: ink("--raised"),
      bordercolor: ink("--edge"),
      font: { family: ink("--font"), color: ink("--ink") },
      namelength: -1,
    },
    showlegend: false,
    dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: axis,
    yaxis: axis,
  };
}

function merged(base, over) {
  const result = { ...base };
  for (const [key, value] of Object.entries(over ?? {})) {
    const both = value && typeof value === "object" && !Array.isArray(value) && result[key] && typeof result[key] === "object";
    result[key] = both ? merged(result[key], value) : value;
  }
  return result;
}

/** Return text that Plotly shows as it is: it reads a few tags and entities in what it is given. */
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

/** Return a long name on several lines, for a chart's axis. */
function wrapped(text, width) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const last = lines.length - 1;
    if (lines[last] && lines[last].length + word.length + 1 > width) lines.push(word);
    else lines[last] = lines[last] ? `${lines[last]} ${word}` : word;
  }
  return lines.map((line) => plain(line.length > width + 8 ? `${line.slice(0, width + 7)}…` : line)).join("<br>");
}

const narrow = () => window.innerWidth < 640;

/** Return the traces of one method's curve: its band over seeds (paler among many), and the mean. */
function curveTraces(label, style, curve, text, crowded) {
  const traces = [];
  if (curve.n > 1) {
    traces.push({
      x: [...curve.x, ...curve.x.slice().reverse()],
      y: [...curve.high, ...curve.low.slice().reverse()],
      fill: "toself",
      fillcolor: translucent(style.colour, crowded ? 0.09 : 0.17),
      line: { width: 0 },
      mode: "lines",
      hoverinfo: "skip",
      meta: "band",
    });
  }
  traces.push({
    x: curve.x,
    y: curve.mean,
    name: plain(label),
    mode: curve.x.length > (narrow() ? 18 : 40) ? "lines" : "lines+markers",
    line: { color: style.colour, width: 2.2, dash: style.dash },
    marker: { color: style.colour, symbol: style.symbol, size: 7 },
    text,
    hovertemplate: "%{text}",
    meta: "mean",
  });
  return traces;
}

/** Return an axis that counts rounds or experiences: whole numbers only. */
function countAxis(traces, title) {
  const most = Math.max(...traces.flatMap((trace) => trace.x));
  return { title: { text: title }, ...(most <= 15 ? { dtick: 1 } : {}), tickformat: "d" };
}

/** Return a heat map's trace and the layout that goes with it; rows from top to bottom. */
function heatMap({ rows, columns, values, texts, hover, title, range, log }) {
  const shown = log ? values.map((row) => row.map((value) => (value > 0 ? Math.log10(value) : null))) : values;
  const bar = { title: { text: title, side: "right" }, thickness: 10, outlinewidth: 0, tickfont: { size: 11 } };
  if (log) {
    const known = shown.flat().filter((value) => value !== null);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    bar.tickvals = ticksBetween(low, high);
    bar.ticktext = bar.tickvals.map((value) => show(10 ** value, false));
  }
  const trace = {
    type: "heatmap",
    z: shown,
    x: upTo(columns.length),
    y: upTo(rows.length),
    text: texts,
    texttemplate: texts ? "%{text}" : undefined,
    textfont: { size: 12 },
    customdata: hover,
    hovertemplate: "%{customdata}<extra></extra>",
    colorscale: "Cividis",
    hoverongaps: false,
    xgap: columns.length > 30 ? 0 : 1,
    ygap: rows.length > 30 ? 0 : 1,
    colorbar: bar,
    ...(range ? { zmin: range[0], zmax: range[1] } : {}),
  };
  const step = Math.max(1, Math.ceil(columns.length / (narrow() ? 6 : 12)));
  const ticks = upTo(columns.length).filter((i) => i % step === 0);
  const layout = {
    xaxis: { tickvals: ticks, ticktext: ticks.map((i) => columns[i]), showgrid: false },
    yaxis: { tickvals: upTo(rows.length), ticktext: rows, showgrid: false, autorange: "reversed" },
  };
  return { trace, layout };
}

const ticksBetween = (low, high) => (high > low ? upTo(5).map((i) => low + ((high - low) * i) / 4) : [low]);
