"""LRURec: sequential recommendation with linear recurrent units (arXiv 2310.02367)."""
