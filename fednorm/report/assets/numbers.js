// Numbers as text, and the statistics of curves over seeds.

const UNKNOWN = "–";
const MINUS = "−";

const known = (value) => value !== null && value !== undefined;

/** Return a number's first twelve digits, what tables round from: [integer, power of ten, sign]. */
function decimal(value) {
  const [digits, power] = Math.abs(value).toExponential(11).split("e");
  return [BigInt(digits.replace(".", "")), Number(power) - 11, value < 0 ? MINUS : ""];
}

/** Return an integer times a power of ten as an integer, rounded half to even. */
function scaled(integer, power) {
  if (power >= 0) return integer * 10n ** BigInt(power);
  const unit = 10n ** BigInt(-power);
  const [whole, rest] = [integer / unit, 2n * (integer % unit)];
  return whole + (rest > unit || (rest === unit && whole % 2n === 1n) ? 1n : 0n);
}

/** Return an integer with a decimal point before its last places. */
function pointed(integer, places) {
  const text = String(integer).padStart(places + 1, "0");
  return places ? `${text.slice(0, -places)}.${text.slice(-places)}` : text;
}

/** Return a number with so many decimal places, rounded once, as fednorm.report.numbers does; `shift` 2 for per cent. */
function fixed(value, places, shift = 0) {
  if (!known(value)) return UNKNOWN;
  const [integer, power, sign] = decimal(value);
  const rounded = scaled(integer, power + shift + places);
  return (rounded ? sign : "") + pointed(rounded, places);
}

/** Return a number with three significant digits, none before the point dropped, and no zeros that only fill up. */
function significant(value) {
  if (!known(value)) return UNKNOWN;
  const [integer, power, sign] = decimal(value);
  if (integer === 0n) return "0";
  let size = power + 11;
  let rounded = scaled(integer, -9);
  if (rounded === 1000n) [rounded, size] = [100n, size + 1];
  const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (size < -4 || size >= 6) return `${sign}${bare(pointed(rounded, 2))}e${size < 0 ? MINUS : "+"}${String(Math.abs(size)).padStart(2, "0")}`;
  return sign + (size >= 3 ? String(scaled(integer, power)) : bare(pointed(rounded, 2 - size)));
}

/** Return a number as a table shows it: a share in per cent with one decimal, else three significant digits. */
const show = (value, percent) => (percent ? fixed(value, 1, 2) : significant(value));

/** Return the ends of an interval as text: "[86.1, 88.4]". */
const ends = (low, high, percent) => `[${show(low, percent)}, ${show(high, percent)}]`;

function withSign(value, percent) {
  const text = show(value, percent);
  return value > 0 && /[1-9]/.test(text) ? `+${text}` : text;
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
  return found.length ? found.reduce((sum, value) => sum + value, 0) / found.length : null; // its noise is never shown
}

/** Return the geometric mean: of weight norms and learning rates it keeps rate = lr / norm^p true of the means. */
function geometricMean(values) {
  const found = values.filter((value) => known(value) && value > 0);
  return found.length ? Math.exp(mean(found.map(Math.log))) : null;
}

/**
 * Return the mean over several curves [xs, ys] at every x that all of them have, and a band: from three seeds on the 95 %
 * interval of the mean (Student's t, whose quantiles by n are given), with two from the lowest to the highest.
 * Figures of fednorm.report.plotting have the same bands.
 */
function overSeeds(curves, quantiles, bounds) {
  const at = new Map();
  for (const [xs, ys] of curves) {
    xs.forEach((x, i) => {
      if (!known(ys[i])) return;
      if (!at.has(x)) at.set(x, []);
      at.get(x).push(ys[i]);
    });
  }
  const n = curves.length;
  const x = [...at.keys()].filter((value) => at.get(value).length === n).sort((a, b) => a - b);
  const bands = x.map((value) => band(at.get(value), quantiles[n], bounds));
  return { x, mean: x.map((value) => mean(at.get(value))), low: bands.map((ends) => ends[0]), high: bands.map((ends) => ends[1]), n };
}

function band(values, quantile, bounds) {
  if (!quantile) return [Math.min(...values), Math.max(...values)];
  const middle = mean(values);
  const squares = values.reduce((sum, value) => sum + (value - middle) ** 2, 0);
  const half = quantile * Math.sqrt(squares / (values.length - 1) / values.length);
  const [least, most] = bounds ?? [-Infinity, Infinity];
  return [Math.max(middle - half, least), Math.min(middle + half, most)];
}
