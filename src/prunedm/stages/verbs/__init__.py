"""One module a function of `prunedm.stages`, which has their names: modules there would hide them."""
