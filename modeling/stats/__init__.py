"""Estimators of a comparison, over numpy arrays. No file here knows a model, a checkpoint or a page."""
