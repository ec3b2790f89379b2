// The machines that are alive.

import {bar, chip, fill, h} from "./dom.js";
import {bytes, percent, rate} from "./format.js";

export function showNodes(element, total, {nodes, total: alive}) {
  if (!nodes.length) {
    total.textContent = "";
    return fill(element, h("p", {class: "empty"}, "No node is alive. Start one with ", h("code", {}, "fairshard node"), "."));
  }
  const flop = nodes.reduce((sum, node) => sum + (node.flop_per_s || 0), 0);
  const memory = nodes.reduce((sum, node) => sum + (node.memory_bytes || 0), 0);
  const these = alive > nodes.length ? `${alive} alive, of the first ${nodes.length}: ` : `${alive} alive · `;
  total.textContent = `${these}${rate(flop)} · ${bytes(memory)}`;
  const most = Math.max(...nodes.map((node) => node.flop_per_s || 0), 1);
  return fill(element, nodes.map((node) => h("div", {class: "node"},
    h("span", {class: "name"}, node.node_id, " ",
      node.wedged ? chip("wedged") : (node.running || []).length ? chip("running") : null),
    h("span", {class: "figures"}, `${rate(node.flop_per_s)} · ${bytes(node.memory_bytes)}`),
    h("span", {class: "device"}, node.device || "device not named"),
    h("span", {class: "figures hint"}, [node.load ? `${percent(node.load)} in use` : "", node.queue_length ? `${node.queue_length} waiting` : "",
      (node.shards || []).length ? `${node.shards.length} shard${node.shards.length === 1 ? "" : "s"}` : ""].filter(Boolean).join(" · ")),
    bar((node.flop_per_s || 0) / most, `${node.node_id}: compute beside the fastest node's`))));
}
