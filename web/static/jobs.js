// The list of jobs, and one job with its steps.

import {bar, chip, fill, h} from "./dom.js";
import {ago, progress, seconds} from "./format.js";
import {lacking} from "./plan.js";

const ENDED = new Set(["done", "failed", "cancelled"]);
export const ended = (job) => ENDED.has(job.state);

export function showJobs(element, jobs, chosen, choose) {
  if (!jobs.length) return fill(element, h("p", {class: "empty"}, "Nothing yet. Divide a model above."));
  const rows = jobs.map((job) => h("tr", {class: job.job_id === chosen ? "chosen" : null},
    h("th", {scope: "row"}, h("button", {class: "link", type: "button", "data-key": job.job_id,
      "aria-pressed": String(job.job_id === chosen), click: () => choose(job.job_id)}, job.model_name)),
    h("td", {class: "wide"}, job.kind),
    h("td", {}, chip(job.state)),
    h("td", {}, ended(job) ? "" : (job.step || "")),
    h("td", {class: "number"}, ago(job.created_at))));
  return fill(element, h("div", {class: "scroll"}, h("table", {},
    h("caption", {class: "hidden-text"}, "Jobs, newest first"),
    h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "Model"), h("th", {scope: "col", class: "wide"}, "Kind"), h("th", {scope: "col"}, "State"), h("th", {scope: "col"}, "Step"), h("th", {scope: "col", class: "number"}, "Submitted"))),
    h("tbody", {}, rows))));
}

function stepRow(step) {
  const known = step.progress && step.progress.total;
  const fraction = step.state === "done" ? 1 : step.state === "running" ? (known ? step.progress.done / step.progress.total : null) : 0;
  const kind = step.state === "done" ? "done" : step.state === "failed" || step.state === "lost" ? "failed" : "";
  const notes = [step.state === "running" ? progress(step.progress) : "", step.attempts > 1 ? `attempt ${step.attempts}` : "",
    step.node_id && !step.name.includes(step.node_id) ? `on ${step.node_id}` : "",
    step.started_at && step.ended_at ? seconds((Date.parse(step.ended_at) - Date.parse(step.started_at)) / 1000) : ""].filter(Boolean).join(" · ");
  return h("li", {},
    h("span", {class: "name"}, step.name.replace(":", " on ")),
    h("span", {}, chip(step.state)),
    bar(fraction, `${step.name}: ${step.state}`, kind),
    h("span", {class: "what"}, notes),
    step.error ? h("p", {class: "error"}, step.error.message) : null);
}

export function showJob(element, job, {cancel, plan}) {
  const planId = job.result && job.result.plan_id;
  fill(element,
    h("p", {class: "row middle"}, chip(job.state), h("span", {class: "hint"}, `${job.kind} · ${job.job_id}`),
      ended(job) ? null : h("button", {class: "quiet", type: "button", "data-key": "cancel", click: cancel}, "Cancel"),
      planId ? h("button", {class: "quiet", type: "button", "data-key": "plan", click: () => plan(planId)}, "Show its plan") : null),
    job.error && !(job.steps || []).some((step) => step.error && step.error.message === job.error.message) ? h("p", {class: "error", role: "alert"}, job.error.message) : null,
    lacking(((job.result || {}).metadata || {}).missing_tensors),
    h("ol", {class: "steps"}, (job.steps || []).map(stepRow)));
}
