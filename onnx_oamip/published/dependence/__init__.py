"""SNACS, MINT and partial correlation: importance by dependence between adjacent layers."""
