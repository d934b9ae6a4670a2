"""A finished student, as it is read back: what it says of itself, its files, its routers."""
