// The document's elements. Text is only ever set as text: nothing that comes from a record is read as markup.

const data = JSON.parse(document.getElementById("data").textContent);

/** Make an element: `class`, `text` and `on` are short for className, textContent and listeners; null is left out. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Make a labelled <select>; `options` are [value, text] or [value, text, group]. */
function picker(label, options, chosen, changed) {
  const select = el("select", { on: { change: () => changed(select.value) } });
  const groups = new Map();
  for (const [value, text, group] of options) {
    let parent = select;
    if (group) {
      if (!groups.has(group)) {
        groups.set(group, el("optgroup", { label: group }));
        select.append(groups.get(group));
      }
      parent = groups.get(group);
    }
    parent.append(el("option", { value, text }));
  }
  select.value = chosen;
  return el("label", { class: "pick" }, el("span", { text: label }), select);
}

/** Make a section with a heading and what it is about. */
function block(id, heading, about) {
  const title = el("h3", { id: `${id}-title`, text: heading });
  return el("section", { id, class: "block", "aria-labelledby": title.id }, title, about ? el("p", { class: "about", text: about }) : null);
}

/** Return values without repetition, in the order in which they first come. */
const unique = (values) => [...new Set(values)];

const upTo = (count) => Array.from({ length: count }, (_, i) => i);
