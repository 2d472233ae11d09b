// The comparison: a row a method, sorted by any column; under it, on request, a row a seed with links to the runs.

class ComparisonTable {
  constructor(section) {
    this.section = section;
    this.spread = "interval";
    this.baselines = new Set([section.baseline, ...(section.baselines ?? []), ...section.methods.map((method) => method.baseline)]);
    this.columns = this.describe();
    this.bodies = section.methods.map((method, index) => this.body(method, index));
    this.sorted = { column: this.columns.findIndex((column) => column.headline), descending: true };
  }

  describe() {
    const { section } = this;
    const first = section.scores.filter((score) => score.key === section.headline);
    const scores = [...first, ...section.scores.filter((score) => score.key !== section.headline)];
    const columns = [{ label: "method", text: true, value: (method) => method.label }];
    const column = (score) => ({
      label: score.label,
      headline: score.key === section.headline,
      better: score.better,
      score,
      value: (method) => method.scores[score.key]?.[1] ?? null,
      fill: (cell, method, index) => this.fillScore(cell, method.scores[score.key], score, index),
    });
    const paper = (score) => (section.methods.some((method) => method.paper[score.key]) ? [{
      label: score.key === section.headline ? "paper" : `paper: ${score.label}`,
      about: `What the paper reports of ${score.label}, and ours minus the paper's`,
      value: (method) => method.paper[score.key]?.value ?? null,
      fill: (cell, method) => this.fillPaper(cell, method.paper[score.key], score),
    }] : []);
    columns.push(...first.flatMap((score) => [column(score), ...paper(score)]));
    const headline = first[0];
    if (headline && section.methods.some((method) => method.differences[headline.key])) {
      columns.push({
        label: `difference from ${section.baseline}`,
        about: `Difference of ${headline.label} from ${section.baseline}, paired by seed`,
        value: (method) => method.differences[headline.key]?.[1] ?? null,
        better: 0,
        fill: (cell, method) => this.fillDifference(cell, method, headline),
      });
    }
    columns.push(...scores.slice(first.length).flatMap((score) => [column(score), ...paper(score)]));
    if (section.methods.some((method) => known(method.rank))) {
      columns.push({
        label: "mean rank",
        better: -1,
        value: (method) => method.rank,
        fill: (cell, method) => cell.append(el("span", { class: "number", text: fixed(method.rank, 1) })),
      });
    }
    return columns;
  }

  fillScore(cell, found, score, index) {
    if (!found) return cell.append(el("span", { class: "number", text: UNKNOWN }));
    const [n, value, std, low, high] = found;
    const runs = runsOf(this.section, index);
    const text = show(value, score.percent);
    const single = n === 1 && runs.length === 1;
    cell.append(single ? el("a", { class: "number", href: `#${runs[0].id}`, text }) : el("span", { class: "number", text }));
    if (n > 1) {
      const spread = this.spread === "interval" && known(low) ? ends(low, high, score.percent) : `± ${show(std, score.percent)}`;
      cell.append(el("span", { class: "spread", text: spread }));
    }
    if (n < runs.length) cell.append(el("span", { class: "spread", text: `n = ${n}` }));
    return cell;
  }

  fillDifference(cell, method, score) {
    const found = method.differences[score.key];
    if (!found) return cell.append(el("span", { class: "number", text: this.baselines.has(method.label) ? "baseline" : UNKNOWN }));
    const [n, value, low, high, better, worse] = found;
    cell.append(el("span", { class: "number", text: withSign(value, score.percent) }));
    if (known(low)) cell.append(el("span", { class: "spread", text: ends(low, high, score.percent) }));
    if (n > 1) cell.append(el("span", { class: "spread", text: `${better} of ${n} better` }));
    cell.title = `from ${method.baseline}, paired by seed: ${better} of ${plural(n, "seed")} better, ${worse} worse`;
    return cell;
  }

  fillPaper(cell, paper, score) {
    if (!paper) return cell.append(el("span", { class: "number", text: UNKNOWN }));
    cell.append(el("span", { class: "number", text: show(paper.value, score.percent) + (known(paper.std) ? ` ± ${show(paper.std, score.percent)}` : "") }));
    if (known(paper.deviation)) cell.append(el("span", { class: "spread", text: `ours ${withSign(paper.deviation, score.percent)}${paper.mark}` }));
    cell.title = paper.source;
    return cell;
  }

  body(method, index) {
    const row = el("tr");
    const body = el("tbody", { "data-method": index }, row);
    body.method = method;
    return body;
  }

  fill(body, index) {
    const row = body.rows[0];
    const runs = runsOf(this.section, index);
    const toggle = runs.length === 1 ? el("a", { class: "seed-link", href: `#${runs[0].id}`, text: `seed ${runs[0].seed}` }) : el("button", {
      type: "button",
      class: "seeds",
      "aria-expanded": body.rows.length > 1 ? "true" : "false",
      text: plural(runs.length, "seed"),
      on: { click: () => this.toggle(body, index, toggle) },
    });
    const name = el("span", { class: "name" }, this.section.view.mark(index), el("span", { text: body.method.label }));
    const cells = this.columns.slice(1).map((column) => {
      const cell = el("td");
      column.fill(cell, body.method, index);
      if (column.score?.best === index) cell.classList.add("best");
      return cell;
    });
    row.replaceChildren(el("th", { scope: "row" }, name, toggle), ...cells);
  }

  toggle(body, index, button) {
    const open = body.rows.length === 1;
    button.setAttribute("aria-expanded", String(open));
    if (!open) {
      while (body.rows.length > 1) body.rows[1].remove();
      return;
    }
    for (const run of runsOf(this.section, index)) {
      const cells = this.columns.slice(1).map((column) => {
        const value = column.score ? run.final[column.score.key] : null;
        const link = known(value) ? el("a", { href: `#${run.id}`, text: show(value, column.score.percent) }) : null;
        return el("td", {}, link);
      });
      const name = el("a", { href: `#${run.id}`, text: `seed ${run.seed}` });
      body.append(el("tr", { class: "seed" }, el("th", { scope: "row" }, name), ...cells));
    }
  }

  heads() {
    return this.columns.map((column, number) => {
      const button = el("button", { type: "button", text: column.label, title: column.about, on: { click: () => this.sortBy(number) } });
      return el("th", { scope: "col", "aria-sort": "none" }, button);
    });
  }

  sortBy(number, descending) {
    const same = this.sorted.column === number;
    const first = !this.columns[number].text && (this.columns[number].better ?? 1) >= 0;
    this.sorted = { column: number, descending: descending ?? (same ? !this.sorted.descending : first) };
    this.order();
  }

  order() {
    const { column: number, descending } = this.sorted;
    const column = this.columns[number];
    [...this.head.cells].forEach((cell, i) => {
      cell.setAttribute("aria-sort", i === number ? (descending ? "descending" : "ascending") : "none");
    });
    const sign = descending ? -1 : 1;
    const sorted = [...this.bodies].sort((a, b) => {
      const [x, y] = [column.value(a.method), column.value(b.method)];
      if (!known(x) || !known(y)) return Number(known(y)) - Number(known(x)); // unknown comes last either way
      return sign * (column.text ? x.localeCompare(y, "en", { numeric: true }) : x - y);
    });
    this.table.append(...sorted);
  }

  filter(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const body of this.bodies) {
      body.hidden = !words.every((word) => body.method.label.toLowerCase().includes(word));
      shown += Number(!body.hidden);
    }
    this.status.textContent = words.length ? `${shown} of ${plural(this.bodies.length, "method")}` : "";
  }

  refill() {
    this.bodies.forEach((body, index) => this.fill(body, index));
  }

  element() {
    this.head = el("tr", {}, ...this.heads());
    this.status = el("span", { class: "status", role: "status" });
    this.table = el("table", { class: "comparison" }, el("caption", { class: "hidden", text: `Comparison: ${this.section.title}` }), el("thead", {}, this.head));
    this.refill();
    const headline = this.columns[this.sorted.column];
    if (headline) this.sortBy(this.sorted.column, (headline.better ?? 1) >= 0);
    else this.table.append(...this.bodies);
    const input = el("input", { type: "search", placeholder: "Filter methods", "aria-label": "Filter the table's methods", on: { input: () => this.filter(input.value) } });
    const controls = el("div", { class: "controls" }, input);
    if (this.section.methods.some((method) => Object.values(method.scores).some((score) => known(score[3])))) {
      const options = [["interval", `${Math.round(100 * this.level())} % interval`], ["std", "standard deviation"]];
      controls.append(picker("under each mean", options, this.spread, (value) => this.setSpread(value)));
    }
    controls.append(this.status);
    const box = el("div", { class: this.bodies.length > CHIPS_AT_MOST ? "scroll tall" : "scroll", tabindex: 0, role: "region", "aria-label": "Comparison table, scrolls sideways" }, this.table);
    const hint = el("p", { class: "hint", "aria-hidden": true, text: "More columns: scroll sideways →" });
    const more = () => {
      const beyond = box.scrollWidth - box.clientWidth;
      hint.hidden = beyond <= 1;
      box.classList.toggle("more", box.scrollLeft < beyond - 1);
      box.classList.toggle("moved", box.scrollLeft > 1);
    };
    box.addEventListener("scroll", more, { passive: true });
    new ResizeObserver(more).observe(box);
    return el("div", { class: "comparing" }, controls, hint, box, tableButtons(this.section));
  }

  level() {
    return this.section.methods.find((method) => method.interval)?.interval.level ?? 0.95;
  }

  setSpread(value) {
    this.spread = value;
    for (const body of this.bodies) while (body.rows.length > 1) body.rows[1].remove();
    this.refill();
  }
}
