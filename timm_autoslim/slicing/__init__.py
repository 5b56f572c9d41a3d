"""Cut what widths keep: one tensor's slice, and all slices of a model, for a call or for good."""
