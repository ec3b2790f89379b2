"""What a node holds: laid out, proven, served to other nodes, put together again."""
