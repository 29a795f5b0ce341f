"""The method of ScaleKD (arXiv 2411.06786), in torch alone."""
