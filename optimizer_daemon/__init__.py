"""Runs Optuna trials that train LoRAs; draws, watches, prunes and ranks them."""
