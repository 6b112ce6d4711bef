"""`python -m diffusers_sae.cli`, which `accelerate launch -m diffusers_sae.cli train ...` wants."""

from . import main

main()
