"""What is not a diffusers denoiser, made a diffusers pipeline or model, so that sites, SAEs and edits work on it."""
