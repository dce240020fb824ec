"""How a network is run: device, precision, captured steps, fused kernels, counted queries, random numbers."""
