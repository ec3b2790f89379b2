"""Bytes from other machines: ranges over HTTP, and how long to be patient."""
