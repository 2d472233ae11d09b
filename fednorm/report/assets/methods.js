// The methods of a section: what each looks like, and which of them the charts show.

// Okabe and Ito's colours, which the colour-blind tell apart; a dash pattern and a marker say the same again.
const PALETTE = {
  light: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#3b3f46", "#a89a00"],
  dark: ["#4aa8e0", "#ef7d2d", "#1fbf92", "#d993b9", "#f0b429", "#8fd0f5", "#e4e6ea", "#f0e442"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];
const GLYPHS = ["●", "■", "◆", "▲", "✚", "✖", "★", "▼"];

const SHOWN_AT_FIRST = 8;
const CHIPS_AT_MOST = 12;

class Methods {
  constructor(section) {
    this.section = section;
    this.labels = section.methods.map((method) => method.label);
    this.slots = new Map();
    this.listeners = [];
    this.boxes = [];
    for (const index of byHeadline(section).slice(0, SHOWN_AT_FIRST).sort((a, b) => a - b)) this.take(index);
  }

  /** Give a method a colour: that of its kin, where one of them is shown, else the first that is free. */
  take(index) {
    const mate = [...this.slots.keys()].find((other) => this.kin(other)[0] === this.kin(index)[0]);
    const taken = new Set(this.slots.values());
    let slot = 0;
    while (taken.has(slot)) slot += 1;
    this.slots.set(index, mate === undefined ? slot : this.slots.get(mate));
  }

  /** Return the number of the strategy and norm that a method's rows share, and the row's own among them. */
  kin(index) {
    return this.section.methods[index].kin;
  }

  get shown() {
    return [...this.slots.keys()].sort((a, b) => a - b);
  }

  has(index) {
    return this.slots.has(index);
  }

  set(index, on) {
    if (on === this.has(index)) return;
    if (on) this.take(index);
    else this.slots.delete(index);
    this.changed();
  }

  setAll(on) {
    if (!on) this.slots.clear();
    else for (const index of this.labels.keys()) if (!this.has(index)) this.take(index);
    this.changed();
  }

  changed() {
    for (const refresh of this.boxes) refresh();
    if (this.heading) this.heading.textContent = this.said();
    for (const listener of this.listeners) listener();
  }

  said() {
    return `Methods in the charts: ${this.slots.size} of ${this.labels.length}`;
  }

  style(index) {
    const slot = this.slots.get(index) ?? 0;
    const [group, tone] = this.kin(index);
    const tones = this.section.methods.filter((method) => method.kin[0] === group).length;
    const mark = tones > 1 ? tone : slot;
    return {
      colour: tones > 1 ? paler(this.hue(index), (0.45 * tone) / (tones - 1)) : this.hue(index),
      dash: DASHES[mark % DASHES.length],
      symbol: SYMBOLS[mark % SYMBOLS.length],
      glyph: GLYPHS[mark % GLYPHS.length],
    };
  }

  /** Return the colour of a method and its kin. */
  hue(index) {
    const colours = PALETTE[dark ? "dark" : "light"];
    return colours[(this.slots.get(index) ?? 0) % colours.length];
  }

  /** Return a mark in the method's colour and shape; it follows selection and theme. */
  mark(index) {
    const mark = el("span", { class: "mark-of", "aria-hidden": true });
    const refresh = () => {
      mark.textContent = this.has(index) ? this.style(index).glyph : "○";
      mark.style.color = this.has(index) ? this.style(index).colour : "";
    };
    this.boxes.push(refresh);
    refresh();
    return mark;
  }

  /** Return the bar with a checkbox for each method. */
  bar() {
    const chips = this.labels.map((label, index) => this.chip(label, index));
    const list = el("div", { class: "chips", role: "group", "aria-label": "Methods in the charts" }, ...chips);
    if (this.labels.length <= CHIPS_AT_MOST) return el("div", { class: "methods" }, list);
    const filter = el("input", { type: "search", placeholder: "Filter methods", "aria-label": "Filter methods" });
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      chips.forEach((chip, i) => (chip.hidden = !this.labels[i].toLowerCase().includes(wanted)));
    });
    const none = el("button", { type: "button", text: "None", on: { click: () => this.setAll(false) } });
    this.heading = el("summary", { text: this.said() });
    list.classList.add("many");
    return el("details", { class: "methods" }, this.heading, el("div", { class: "controls" }, filter, none), list);
  }

  chip(label, index) {
    const box = el("input", { type: "checkbox" });
    box.checked = this.has(index);
    box.addEventListener("change", () => this.set(index, box.checked));
    this.boxes.push(() => (box.checked = this.has(index)));
    return el("label", { class: "chip", title: label }, box, this.mark(index), el("span", { text: label }));
  }
}

const NONE_CHOSEN = "No method is chosen. Choose one above.";

/** Return the methods' numbers, best headline score first, unknown ones last. */
function byHeadline(section, key = section.headline) {
  const better = section.scores.find((score) => score.key === key)?.better || 1;
  const at = (index) => section.methods[index].scores[key]?.[1];
  return [...section.methods.keys()].sort((a, b) => {
    if (!known(at(a)) || !known(at(b))) return Number(known(at(b))) - Number(known(at(a)));
    return better * (at(b) - at(a));
  });
}

/** Return the runs of a method. */
const runsOf = (section, index) => section.runs.filter((run) => run.method === index);
