"""A plan that runs: announcement, sessions on each node, frames from node to node, tokens to whoever asked."""
