// Numbers with their units.

function scaled(value, units, base) {
  let index = 0;
  while (Math.abs(value) >= base && index < units.length - 1) { value /= base; index += 1; }
  const digits = value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${units[index]}`.trim();
}

const known = (format) => (value) => (value === null || value === undefined || Number.isNaN(value) ? "–" : format(Number(value)));

export const bytes = known((value) => scaled(value, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024));
export const flop = known((value) => scaled(value, ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"], 1000));
export const rate = known((value) => scaled(value, ["FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"], 1000));
export const percent = known((value) => `${(value * 100).toFixed(value > 0 && value < 0.1 ? 1 : 0)} %`);

export const seconds = known((value) => {
  if (value === 0) return "0 s";
  if (value < 1e-3) return scaled(value * 1e6, ["µs"], 1000);
  if (value < 1) return scaled(value * 1e3, ["ms"], 1000);
  if (value < 120) return scaled(value, ["s"], 1000);
  return value < 7200 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
});

/** Done and total of a step: bytes are written as bytes. */
export function progress(step) {
  if (!step) return "";
  const size = /^(headers|layers|trace)/.test(step.what || "") ? String : bytes;
  const total = step.total ? ` of ${size(step.total)}` : "";
  const pace = step.rate_per_s ? ` · ${size(Math.round(step.rate_per_s))}/s` : "";
  const left = step.rate_per_s && step.eta_s !== null && step.eta_s !== undefined ? ` · ${seconds(step.eta_s)} left` : "";
  return `${size(step.done ?? 0)}${total}${step.what ? ` · ${step.what}` : ""}${pace}${left}`;
}

/** How long ago, in words. */
export function ago(time) {
  if (!time) return "";
  const past = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (past < 5) return "now";
  if (past < 60) return `${Math.floor(past)} s ago`;
  if (past < 3600) return `${Math.floor(past / 60)} min ago`;
  return past < 86400 ? `${Math.floor(past / 3600)} h ago` : `${Math.floor(past / 86400)} d ago`;
}

/** Names of a stack as ranges: "model.layers.0 – 11, lm_head". */
export function ranges(names) {
  const found = [];
  for (const name of names) {
    const match = /^(.*?)(\d+)$/.exec(name);
    const last = found.at(-1);
    if (match && last && last.stem === match[1] && last.end + 1 === Number(match[2])) last.end += 1;
    else found.push(match ? {stem: match[1], begin: Number(match[2]), end: Number(match[2])} : {name});
  }
  const shown = found.slice(0, 8).map((part) => part.name ?? (part.begin === part.end ? `${part.stem}${part.begin}` : `${part.stem}${part.begin} – ${part.end}`));
  return shown.join(", ") + (found.length > 8 ? `, and ${found.length - 8} more` : "");
}
