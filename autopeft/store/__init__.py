"""A run's folder: paths, atomic files, the run lock, leases, and the storage of the outer loop."""
