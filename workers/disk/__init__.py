"""Bytes and folders on this machine: copied, durable, within their room."""
