"""What the latents mean: statistics per timestep, concept scores."""
