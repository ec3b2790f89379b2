"""Talks: the REST API and the page."""
