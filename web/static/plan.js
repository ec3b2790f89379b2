// A plan: who holds what, how full each node is, the chain, the reasons, and what other strategies would give.

import {bar, fill, h} from "./dom.js";
import {bytes, flop, percent, ranges, rate, seconds} from "./format.js";

const estimated = (plan) => (plan.approximate || []).length > 0;
// What rests on estimates says so.
const marked = (plan) => (text) => (estimated(plan) && text !== "–" ? `≈ ${text}` : text);

const fact = (name, value, title) => h("div", {title}, h("dt", {}, name), h("dd", {}, value));

function facts(plan) {
  const {predicted} = plan;
  const about = marked(plan);
  return h("dl", {class: "facts"},
    fact("strategy", plan.strategy),
    fact(plan.unit === "tensor" ? "tensors" : "layers", plan.metadata.total_layers.toLocaleString("en")),
    fact("one pass", about(flop(plan.metadata.total_compute))),
    fact("bottleneck", about(seconds(predicted.bottleneck_s)), "The slowest node's time for one pass; it bounds throughput."),
    fact("latency", about(seconds(predicted.latency_s)), "One pass through the chain, links included."),
    fact("above the bound", predicted.exact && !estimated(plan) ? "0 %, proven" : about(percent(predicted.gap)), `No plan on these nodes is faster than ${about(seconds(predicted.lower_bound_s))}.`));
}

function warning(plan) {
  if (!estimated(plan)) return null;
  return h("p", {class: "notice", role: "note"}, `The figures marked ≈ rest on an approximate profile: ${plan.approximate.join("; ")}.`);
}

/** What is said of the tensors that a checkpoint lacks; nothing if it has all. */
export function lacking(lost) {
  if (lost === undefined || (lost && !lost.length)) return null;
  return h("p", {class: "notice", role: "note"}, lost === null ? "Whether the checkpoint lacks tensors of its model was not checked."
    : `The checkpoint lacks ${lost.length} ${lost.length === 1 ? "tensor" : "tensors"} of its model: ${lost.slice(0, 12).join(", ")}${lost.length > 12 ? ", …" : ""}.`);
}

function strip(plan, tone) {
  const parts = plan.stages.map((stage) => {
    const part = h("div", {class: `part ${tone(stage.node_id)}`, title: `${stage.node_id}: ${ranges(stage.layer_names)}`},
      (stage.end - stage.start) / plan.metadata.total_layers > 0.06 ? stage.node_id : "");
    part.style.flexGrow = String(Math.max(1, stage.end - stage.start));
    return part;
  });
  return h("div", {class: "strip", role: "img", "aria-label": `${plan.metadata.total_layers} layers in order of execution, in ${plan.stages.length} runs`}, parts);
}

const gauge = (label, fraction, text, node, kind = "") => h("div", {class: "gauge"},
  h("span", {class: "label"}, label), bar(fraction, `${node}: ${label}`, kind), h("span", {}, text));

const unit = (plan, count) => `${plan.unit === "tensor" ? "tensor" : "layer"}${count === 1 ? "" : "s"}`;

function share(plan, report, tone) {
  const part = plan.split_plan[report.node_id];
  const memory = report.memory_used_bytes + report.memory_free_bytes;
  const about = marked(plan);
  return h("div", {class: `share ${tone(report.node_id)} ${report.used ? "" : "unused"}`},
    h("div", {},
      h("span", {class: "name"}, h("span", {class: "dot", "aria-hidden": "true"}), report.node_id),
      h("span", {class: "layers"}, part ? `${part.layer_names.length} ${unit(plan, part.layer_names.length)}: ${ranges(part.layer_names)}` : "not used")),
    h("div", {},
      report.used ? gauge("compute", report.compute_utilization, about(`${flop(report.flop)} · ${percent(report.compute_utilization)} of ${seconds(plan.time_budget_s)}`), report.node_id) : null,
      report.used ? gauge("memory", memory ? report.memory_used_bytes / memory : 0, about(`${bytes(report.memory_used_bytes)} of ${bytes(memory)}`), report.node_id, "memory") : null,
      h("p", {class: "reason"}, report.reason)));
}

function chain(plan, tone) {
  const shown = plan.megaphone_plan.chain.slice(0, 60);
  return [
    h("h3", {}, "Megaphone chain"),
    h("p", {class: "hint"}, `${plan.megaphone_plan.start_node} announces the work to all, runs its part and passes the rest on.`),
    h("ol", {class: "chain"}, shown.map((hop) => h("li", {}, h("div", {class: `hop ${tone(hop.node_id)}`},
      h("b", {}, `${hop.step}. ${hop.node_id}`),
      h("span", {}, `${ranges(hop.layer_names)}${hop.payload_bytes && hop.next_nodes.length ? ` · hands on ${bytes(hop.payload_bytes)}` : ""}`))))),
    plan.megaphone_plan.chain.length > shown.length ? h("p", {class: "hint"}, `and ${plan.megaphone_plan.chain.length - shown.length} steps more`) : null,
  ];
}

/** What every strategy would give; `outcomes` null: it is being computed, a string: why it is not known. */
export function comparison(plan, outcomes) {
  if (outcomes === null) return h("p", {class: "hint"}, "Comparing strategies …");
  if (typeof outcomes === "string") return h("p", {class: "hint"}, `The strategies could not be compared: ${outcomes}`);
  const about = marked(plan);
  // The plan's own row is what it says; its strategy planned anew differs where a node was lost on the way.
  const own = {feasible: true, ...plan.predicted, nodes_used: plan.nodes.filter((report) => report.used).length};
  const rows = [[`${plan.strategy}, as planned`, own], ...Object.entries(outcomes)
    .filter(([name, outcome]) => name !== plan.strategy || outcome.bottleneck_s !== own.bottleneck_s)
    .map(([name, outcome]) => [name === plan.strategy ? `${name}, planned anew` : name, outcome])];
  const feasible = rows.map(([, outcome]) => outcome).filter((outcome) => outcome.feasible);
  const least = (key) => Math.min(...feasible.map((outcome) => outcome[key]));
  const cell = (outcome, key) => h("td", {class: `number ${outcome[key] <= least(key) * 1.0005 ? "best" : ""}`}, about(seconds(outcome[key])));
  return h("div", {class: "scroll"}, h("table", {},
    h("caption", {}, "The same model on the same nodes; the best of each column in green"),
    h("thead", {}, h("tr", {}, h("th", {scope: "col"}, "Strategy"), ...["Bottleneck", "Latency", "Above bound", "Nodes"].map((name) => h("th", {scope: "col", class: "number"}, name)))),
    h("tbody", {}, rows.map(([name, outcome]) => h("tr", {class: outcome === own ? "chosen" : null},
      h("th", {scope: "row"}, name),
      ...(outcome.feasible
        ? [cell(outcome, "bottleneck_s"), cell(outcome, "latency_s"), h("td", {class: "number"}, about(percent(outcome.gap))), h("td", {class: "number"}, outcome.nodes_used)]
        : [h("td", {colspan: 4, class: "error"}, outcome.error)]))))));
}

export function showPlan(element, plan, outcomes) {
  const order = [...new Set([...plan.stages.map((stage) => stage.node_id), ...plan.nodes.map((report) => report.node_id)])];
  const place = new Map(order.map((node, index) => [node, index]));
  const reports = [...plan.nodes].sort((a, b) => Number(b.used) - Number(a.used) || place.get(a.node_id) - place.get(b.node_id));
  const tone = (node) => `tone${place.get(node) % 8}`;
  fill(element,
    facts(plan),
    warning(plan),
    lacking(plan.missing_tensors),
    strip(plan, tone),
    h("p", {class: "hint"}, "Layers in order of execution, and below what each node holds of them."),
    h("div", {}, reports.slice(0, 200).map((report) => share(plan, report, tone))),
    reports.length > 200 ? h("p", {class: "hint"}, `and ${reports.length - 200} nodes more`) : null,
    ...chain(plan, tone),
    h("h3", {}, "What other strategies would give"),
    comparison(plan, outcomes),
    h("p", {class: "hint"}, `Plan ${plan.plan_id}${plan.revision ? ` · revision ${plan.revision.slice(0, 12)}` : ""} · batch ${plan.batch_size}, ${plan.sequence_length} tokens`));
}
