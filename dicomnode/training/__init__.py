"""Training: data sets, training, evaluation and export of model packages. Must never import storage or the network."""
