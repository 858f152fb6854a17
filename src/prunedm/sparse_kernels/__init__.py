"""2:4 layers as GEMMs on sparse tensor cores, where they are measured to be faster."""
