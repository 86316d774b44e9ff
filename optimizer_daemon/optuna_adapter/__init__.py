"""The only package that speaks Optuna."""
