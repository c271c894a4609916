"""Evaluation of model packages: matching, measures, summary, pictures, plots and the report. Runs no network itself."""
