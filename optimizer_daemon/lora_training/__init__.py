"""The native trainer's process: LoRA training for SD 1.5 and SDXL with kohya's data sets, names and metadata."""
