"""The mission's strategy: any layer anywhere."""
