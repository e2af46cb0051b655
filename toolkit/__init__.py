"""What tools.py stands on. It imports neither reagent nor results."""
