"""Figures of search results, as matplotlib's: those of the report. A notebook shows them, and `savefig` writes them."""

from timm_autoslim.slimming.plots import descent as descent
from timm_autoslim.slimming.plots import pareto as pareto
from timm_autoslim.slimming.plots import widths as widths
