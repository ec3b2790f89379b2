// The page: what is chosen, what is asked for, and when.

import {call, events, useToken} from "./api.js";
import {announce} from "./dom.js";
import {ended, showJob, showJobs} from "./jobs.js";
import {showNodes} from "./nodes.js";
import {showPlan} from "./plan.js";

const PERIOD_MS = 2000;
const at = (id) => document.getElementById(id);
const state = {job: null, plan: null, watching: null, outcomes: null};

function health(kind, text) {
  const element = at("health");
  if (element.textContent === text) return;
  element.className = `chip ${kind}`;
  element.textContent = text;
}

function failed(error) {
  if (error.status === 401) at("token-card").hidden = false;
  if (error.status === 0) health("away", "no answer");
}

async function lookAtHealth() {
  const response = await fetch("/api/health").catch(() => null);
  if (!response) return health("away", "no answer");
  const found = await response.json();
  const missing = Object.entries(found.checks).filter(([, good]) => !good).map(([name]) => name);
  return missing.length ? health("degraded", `waiting for ${missing.join(", ")}`) : health("healthy", "healthy");
}

async function lookAround() {
  if (document.hidden) return;
  await Promise.allSettled([
    lookAtHealth(),
    call("GET", "/api/jobs?limit=20").then(({jobs}) => showJobs(at("jobs"), jobs, state.job, choose)).catch(failed),
    call("GET", "/api/nodes").then(({nodes}) => showNodes(at("nodes"), at("nodes-total"), nodes)).catch(failed),
  ]);
}

async function refreshJob() {
  const id = state.job;
  const job = await call("GET", `/api/jobs/${id}`);
  if (state.job !== id) return job;
  at("job-card").hidden = false;
  at("job-title").textContent = job.model_name;
  showJob(at("job"), job, {
    cancel: () => call("DELETE", `/api/jobs/${id}`).then(refreshJob).catch((error) => announce(error.message)),
    plan: choosePlan,
  });
  const planId = job.result && job.result.plan_id;
  if (planId && state.plan !== planId) await choosePlan(planId);
  return job;
}

function choose(jobId) {
  state.watching?.abort();
  const watching = new AbortController();
  Object.assign(state, {job: jobId, plan: null, watching});
  at("plan-card").hidden = true;
  watch(watching.signal).catch((error) => { if (error.name !== "AbortError") failed(error); });
  lookAround();
}

// Events say when to look; where they cannot be had (all places taken, a proxy in between) a timer does.
async function watch(signal) {
  let job = await refreshJob();
  if (ended(job)) return;
  let due = false;
  const soon = () => {
    if (due) return;
    due = true;
    setTimeout(() => { due = false; if (!signal.aborted) refreshJob().catch(failed); }, 150);
  };
  try {
    await events(job.job_id, (event, data) => {
      if (event === "step") announce(`${data.step}: ${data.state}`);
      soon();
    }, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    while (!signal.aborted && !ended(job)) {
      await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
      if (!signal.aborted) job = await refreshJob();
    }
  }
  if (signal.aborted) return;
  job = await refreshJob();
  announce(`${job.model_name}: ${job.state}`);
  lookAround();
}

async function choosePlan(planId) {
  state.plan = planId;
  const plan = await call("GET", `/api/plans/${planId}`);
  if (state.plan !== planId) return;
  at("plan-title").textContent = `Plan of ${plan.model_name}`;
  at("plan-card").hidden = false;
  showPlan(at("plan"), plan, null);
  const outcomes = await compare(plan).catch((error) => error.message);
  if (state.plan === planId) showPlan(at("plan"), plan, outcomes);
}

async function compare(plan) {
  const {comparison} = await call("POST", "/api/plans/preview", {body: {
    model_name: plan.model_name, batch_size: plan.batch_size, sequence_length: plan.sequence_length,
    objective: plan.objective, phase: plan.phase, compare: true,
  }});
  return comparison;
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
