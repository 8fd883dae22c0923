"""Image quality against sparsity: points of a grid, measured once each, and where they fall off."""
