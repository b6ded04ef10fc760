"""UniBiomed in JAX: grounded biomedical vision-language modelling for research."""
