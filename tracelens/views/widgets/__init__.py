"""Widgets: a result in, something to explore in Jupyter out. They read what was stored, and run no model, the prompt explorer aside."""
