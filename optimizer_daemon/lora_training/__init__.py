"""The native trainer's process: LoRA training for Stable Diffusion 1.5 with kohya's data sets, names and metadata."""
