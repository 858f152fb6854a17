"""Parts of networks of any family: kinds of layers, widths, blocks, narrowed classes."""
