"""Estimators of a comparison. They work on numpy arrays and import no model, checkpoint or page."""
