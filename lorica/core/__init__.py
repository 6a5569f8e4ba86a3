"""The core: planes, units, hooks, prefetch, gradient reduction."""
