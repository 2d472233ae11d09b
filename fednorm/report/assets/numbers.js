// Numbers as text, and the statistics of curves over seeds.

const UNKNOWN = "–";
const MINUS = "−";

const known = (value) => value !== null && value !== undefined;
const signed = (text) => text.replace("-", MINUS);

/** Return a number as a table shows it: a share in per cent, else three significant digits. */
function show(value, percent) {
  if (!known(value)) return UNKNOWN;
  if (percent) return signed((100 * value).toFixed(1));
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e6) return signed(String(value));
  if (size < 1e-3 || size >= 1e6) return signed(value.toExponential(2));
  return signed(size < 1000 ? value.toPrecision(3) : String(Math.round(value)));
}

/** Return two ends as text: "86.1–88.4", or with a word between where a sign would be misread. */
function ends(low, high, percent) {
  const joint = low < 0 || high < 0 ? " to " : "–";
  return show(low, percent) + joint + show(high, percent);
}

function withSign(value, percent) {
  return (value > 0 ? "+" : "") + show(value, percent);
}

function bytes(count) {
  if (!known(count)) return UNKNOWN;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (count >= 1000 && power < units.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${power ? count.toPrecision(3) : count} ${units[power]}`;
}

function duration(seconds) {
  if (!known(seconds)) return UNKNOWN;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function mean(values) {
  const found = values.filter(known);
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null;
}

/** Return the geometric mean: of weight norms and learning rates it keeps rate = lr / norm^p true of the means. */
function geometricMean(values) {
  const found = values.filter((value) => known(value) && value > 0);
  return found.length ? Math.exp(mean(found.map(Math.log))) : null;
}

/** Return the mean, lowest and highest of several curves [xs, ys] at every x that one of them has. */
function overSeeds(curves) {
  const at = new Map();
  for (const [xs, ys] of curves) {
    xs.forEach((x, i) => {
      if (!known(ys[i])) return;
      if (!at.has(x)) at.set(x, []);
      at.get(x).push(ys[i]);
    });
  }
  const x = [...at.keys()].sort((a, b) => a - b);
  const columns = x.map((value) => at.get(value));
  return {
    x,
    mean: columns.map(mean),
    low: columns.map((values) => Math.min(...values)),
    high: columns.map((values) => Math.max(...values)),
    n: curves.length,
  };
}
