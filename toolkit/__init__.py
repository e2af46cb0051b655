"""What tools.py stands on: search, the web, files, media, the sandbox. It imports neither reagent
nor results.
"""
