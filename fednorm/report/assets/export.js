// What a reader takes along: the comparison as CSV, Markdown or LaTeX, a chart as PNG or SVG.

const KINDS = { csv: ["CSV", "text/csv"], md: ["Markdown", "text/markdown"], tex: ["LaTeX", "application/x-tex"] };

/** Save text, or what an address of the page's own (data:, blob:) holds, as a file. */
function save(name, content, type) {
  const address = type ? URL.createObjectURL(new Blob([content], { type })) : content;
  const link = el("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  if (type) setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** Put text into the clipboard; a browser that refuses it to a page from disk is asked the old way. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = el("textarea", { class: "hidden", "aria-hidden": true });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

/** Return the buttons that copy and download a section's table. */
function tableButtons(section) {
  const status = el("span", { class: "status", role: "status" });
  const copy = Object.entries(KINDS).map(([kind, [name]]) => el("button", {
    type: "button",
    text: name,
    "aria-label": `Copy the table as ${name}`,
    "data-copy": kind,
    on: { click: async () => (status.textContent = (await copied(section.files[kind])) ? `${name} copied` : "The browser refused the clipboard") },
  }));
  const download = Object.entries(KINDS).map(([kind, [name, type]]) => el("button", {
    type: "button",
    text: name,
    "aria-label": `Download the table as ${name}`,
    "data-download": kind,
    on: { click: () => save(`${section.id}.${kind}`, section.files[kind], type) },
  }));
  return el("div", { class: "take" }, el("span", { text: "Copy" }), ...copy, el("span", { text: "Download" }), ...download, status);
}

/** Return the buttons that save a chart, on the page's ground, at twice its size. */
function pictureButtons(chart) {
  const button = (format) => el("button", {
    type: "button",
    text: format.toUpperCase(),
    "aria-label": `Save this chart as ${format.toUpperCase()}`,
    "data-picture": format,
    on: { click: async () => save(`${fileName(chart.plot.getAttribute("aria-label"))}.${format}`, await picture(chart, format)) },
  });
  return el("div", { class: "take pictures" }, button("png"), button("svg"));
}

const fileName = (text) => (text || "chart").toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 80);

/** Return a chart as a data: address; its layout has the page's colour, which charts on the page leave out. */
async function picture(chart, format) {
  const Plotly = await loadPlotly();
  const { data: traces, layout } = chart.plot;
  const whole = { ...layout, paper_bgcolor: ink("--paper"), showlegend: traces.filter((trace) => trace.meta === "mean").length > 1 };
  const named = traces.map((trace) => (trace.meta === "band" ? { ...trace, showlegend: false } : trace));
  const size = { width: chart.plot.clientWidth, height: chart.plot.clientHeight, scale: format === "png" ? 2 : 1 };
  return Plotly.toImage({ data: named, layout: whole }, { format, ...size });
}
