"""The inside of a network, whatever its family: kinds of layers, widths, blocks, narrowed classes."""
