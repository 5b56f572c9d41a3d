"""Cut a model down to a subnet's slices: one tensor's slice, and all slices of a model, for one call or for good."""
