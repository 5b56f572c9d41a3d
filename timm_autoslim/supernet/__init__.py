"""From a channel graph to a search space and its widths, and the supernet that runs them."""
