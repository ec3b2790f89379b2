// Elements without innerHTML: nothing that an answer holds can become markup.

/** Make an element: `h("p", {class: "hint"}, "text", child)`; functions become listeners, null children nothing. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) element.append(child);
  }
  return element;
}

/** Replace what `element` holds, keeping the focus on the part with the same data-key. */
export function fill(element, ...children) {
  const key = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  element.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
  if (key) [...element.querySelectorAll("[data-key]")].find((found) => found.dataset.key === key)?.focus();
}

/** A bar; `fraction` null: under way, no telling how far. */
export function bar(fraction, label, kind = "") {
  const inner = h("div", {class: `fill ${kind} ${fraction === null ? "unknown" : ""}`});
  const percent = fraction === null ? null : Math.max(0, Math.min(100, fraction * 100));
  if (percent !== null) inner.style.width = `${percent}%`;
  return h("div", {class: "track", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100,
    "aria-valuenow": percent === null ? null : Math.round(percent)}, inner);
}

export const chip = (state) => h("span", {class: `chip ${state}`}, state);

/** Say it to those who cannot see it. */
export function announce(text) {
  document.getElementById("announce").textContent = text;
}
