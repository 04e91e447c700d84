"""What likelihoods and decoders ask of a generator, and the two kinds that answer: encoder-decoder and decoder-only."""
