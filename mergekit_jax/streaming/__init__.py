"""A plan is run: read ahead → kernel → write behind."""
