"""Adapters as updates of weights: added, compressed, merged, exported."""
