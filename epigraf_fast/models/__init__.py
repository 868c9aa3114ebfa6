"""The networks: generator (mapping, synthesis, decoder, renderer) and discriminator."""
