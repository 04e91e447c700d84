"""Question and passage to the generator's input; the likelihoods."""
