"""A study file to one frozen `Study`, checked at the boundary, with errors that name the key that was meant."""
