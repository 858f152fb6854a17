"""2:4 layers as GEMMs on sparse tensor cores, where timing says that they are faster."""
