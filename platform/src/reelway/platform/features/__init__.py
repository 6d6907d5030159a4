"""How feature values become model inputs: the code that training, export and serving all run, in numpy."""
