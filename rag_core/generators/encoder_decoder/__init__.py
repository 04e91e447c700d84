"""Generators with an encoder for the context and a decoder for the answer: BART, T5, EncoderDecoderModel."""
