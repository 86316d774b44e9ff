"""A real latent-diffusion world small enough for a laptop: scenes, base model, CLIP, data set, study file."""
