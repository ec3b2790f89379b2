// The page: what is chosen, what is asked for, and when.

import {call, events, useToken} from "./api.js";
import {announce, fill, h} from "./dom.js";
import {ended, showJob, showJobs} from "./jobs.js";
import {showNodes} from "./nodes.js";
import {showPlan} from "./plan.js";

const PERIOD_MS = 2000;
const at = (id) => document.getElementById(id);
const state = {job: null, over: false, plan: null, watching: null, looking: false, seen: {}};

function health(kind, text, why = "") {
  const element = at("health");
  element.title = why;
  if (element.textContent === text) return;
  element.className = `chip ${kind}`;
  element.textContent = text;
}

function failed(error) {
  if (error.status === 401) at("token-card").hidden = false;
  if (error.status === 0) health("away", "no answer");
}

// What could be read is as of now. What could not stays, marked as old, with since when.
function fresh(name) {
  state.seen[name] = new Date();
  at(`${name}-stale`).hidden = true;
  at(`${name}-card`).classList.remove("stale");
}

function stale(name, error) {
  failed(error);
  const seen = state.seen[name];
  const note = at(`${name}-stale`);
  const text = `${seen ? `Stale since ${seen.toLocaleTimeString("en-GB")}` : "Not known"}: ${error.message}`;
  if (note.textContent !== text) note.textContent = text;  // read out once
  note.hidden = false;
  at(`${name}-card`).hidden = false;
  at(`${name}-card`).classList.add("stale");
  if (name === "nodes") at("nodes-total").textContent = "";
}

const look = (name, work) => work.then(() => fresh(name), (error) => stale(name, error));

async function lookAtHealth() {
  const found = await call("GET", "/api/health", {refused: true}).catch(() => null);
  if (!found || found.ready === undefined) return health("away", "no answer", found?.error);
  const missing = Object.entries(found.checks).filter(([, good]) => !good).map(([name]) => name);
  const why = [found.reason, ...found.warnings].filter(Boolean).join("\n");
  if (missing.length) return health("degraded", `waiting for ${missing.join(", ")}`, why);
  return health(why ? "degraded" : "healthy", why ? "healthy, with a warning" : "healthy", why);
}

async function lookAround() {
  if (document.hidden || state.looking) return;
  state.looking = true;
  await Promise.all([
    lookAtHealth(),
    look("jobs", call("GET", "/api/jobs?limit=20").then(({jobs}) => showJobs(at("jobs"), jobs, state.job, choose))),
    look("nodes", call("GET", "/api/nodes").then((found) => showNodes(at("nodes"), at("nodes-total"), found))),
    state.job && !state.over ? refreshJob() : null,
  ]);
  state.looking = false;
}

async function refreshJob() {
  const id = state.job;
  await look("job", call("GET", `/api/jobs/${id}`).then(async (job) => {
    if (state.job !== id) return;
    at("job-card").hidden = false;
    at("job-title").textContent = job.model_name;
    showJob(at("job"), job, {
      cancel: () => call("DELETE", `/api/jobs/${id}`).then(refreshJob).catch((error) => announce(error.message)),
      plan: choosePlan,
    });
    const planId = job.result && job.result.plan_id;
    if (planId && state.plan !== planId) await choosePlan(planId);
    if (ended(job) && !state.over) announce(`${job.model_name}: ${job.state}`);
    state.over = ended(job);
  }));
}

// Events say when to look at once; `lookAround` looks anyway, where they cannot be had or come no more.
async function choose(jobId) {
  state.watching?.abort();
  const watching = new AbortController();
  Object.assign(state, {job: jobId, over: false, plan: null, watching});
  delete state.seen.job;
  at("job-stale").hidden = true;
  at("plan-card").hidden = true;
  lookAround();
  await refreshJob();
  if (state.over || watching.signal.aborted) return;
  let due = false;
  await events(jobId, (event, data) => {
    if (event === "step") announce(`${data.step}: ${data.state}`);
    if (due) return;
    due = true;
    setTimeout(() => { due = false; if (!watching.signal.aborted) refreshJob(); }, 150);
  }, watching.signal).catch(failed);
}

async function choosePlan(planId) {
  state.plan = planId;
  at("plan-title").textContent = "Plan";
  at("plan-card").hidden = false;
  let plan;
  try {
    plan = await call("GET", `/api/plans/${planId}`);
  } catch (error) {
    if (state.plan !== planId) return;
    if (error.status !== 404) state.plan = null;  // the next look asks again
    fill(at("plan"), h("p", {class: "error", role: "alert"},
      error.status === 404 ? `Plan ${planId} was deleted: there is no such plan any more.` : error.message));
    return;
  }
  if (state.plan !== planId) return;
  at("plan-title").textContent = `Plan of ${plan.model_name}`;
  showPlan(at("plan"), plan, null);
  const outcomes = await compare(plan).catch((error) => error.message);
  if (state.plan === planId) showPlan(at("plan"), plan, outcomes);
}

/** What every strategy gives for what the plan was made for, not for what is alive now; a string: why nobody knows. */
async function compare(plan) {
  if (!plan.cluster) return "this plan does not say which nodes it was made for";
  const found = await call("POST", "/api/plans/preview", {body: {
    model_name: plan.model_name, ...(plan.revision ? {revision: plan.revision} : {}),
    batch_size: plan.batch_size, sequence_length: plan.sequence_length,
    ...plan.options, available_nodes: plan.cluster.nodes, links: plan.cluster.links, compare: true,
  }});
  const same = ["total_layers", "total_compute"].every((name) => found.metadata[name] === plan.metadata[name]);
  return same ? found.comparison : "this plan was made from metadata that the service does not have";
}

async function submit(event) {
  event.preventDefault();
  const form = event.target;
  const given = Object.fromEntries(new FormData(form));
  const shape = {batch_size: Number(given.batch_size), sequence_length: Number(given.sequence_length)};
  const body = {
    model_name: given.model_name.trim(), ...shape, ...(given.revision ? {revision: given.revision.trim()} : {}),
    process: {strategy: given.strategy, objective: given.objective, phase: given.phase},
  };
  const button = form.querySelector("button[type=submit]");
  const error = at("submit-error");
  button.disabled = true;
  error.hidden = true;
  try {
    const {job_id: jobId} = await call("POST", "/api/request", {body, more: given.hub_token ? {"X-HF-Token": given.hub_token} : {}});
    form.elements.hub_token.value = "";
    announce(`${body.model_name}: submitted`);
    choose(jobId);
  } catch (refused) {
    failed(refused);
    error.textContent = refused.message;
    error.hidden = false;
  } finally {
    button.disabled = false;
  }
}

at("submit").addEventListener("submit", submit);
at("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("token").value.trim());
  at("token").value = "";
  at("token-card").hidden = true;
  lookAround();
});
if (document.body.dataset.asksForToken === "yes" && !sessionStorage.getItem("fairshard-token")) at("token-card").hidden = false;
document.addEventListener("visibilitychange", lookAround);
lookAround();
setInterval(lookAround, PERIOD_MS);
