"""Conversion of feature values to model inputs, in numpy; training, export and serving run the same code."""
