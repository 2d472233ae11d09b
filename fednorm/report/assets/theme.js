// Light or dark: as the system has it, until the reader chooses.

const system = window.matchMedia("(prefers-color-scheme: dark)");
const STORED = "fednorm-theme";

function stored() {
  try {
    return localStorage.getItem(STORED);
  } catch {
    return null; // a browser may refuse storage to a page from disk
  }
}

let dark = stored() ? stored() === "dark" : system.matches;

function applyTheme() {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  const button = document.getElementById("theme");
  button.textContent = dark ? "Light theme" : "Dark theme";
  redrawAll();
}

function startTheme() {
  document.getElementById("theme").addEventListener("click", () => {
    dark = !dark;
    try {
      localStorage.setItem(STORED, dark ? "dark" : "light");
    } catch {
      // the choice then lasts as long as the page
    }
    applyTheme();
  });
  system.addEventListener("change", () => {
    if (stored()) return;
    dark = system.matches;
    applyTheme();
  });
  applyTheme();
}

/** Return a colour of the style sheet, e.g. ink("--rule"). */
const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function translucent(colour, alpha) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  return `rgba(${r},${g},${b},${alpha})`;
}

/** Return a colour mixed with that of the page: by 0 itself, by 1 the page's. */
function paler(colour, by) {
  const paper = ink("--paper");
  const parts = [1, 3, 5].map((i) => {
    const [own, other] = [colour, paper].map((text) => parseInt(text.slice(i, i + 2), 16));
    return Math.round(own + by * (other - own)).toString(16).padStart(2, "0");
  });
  return `#${parts.join("")}`;
}
