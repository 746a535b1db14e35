"""Models: loaded, adapted, quantised, merged; adapters saved and loaded."""
