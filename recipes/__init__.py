"""Recipes, launch files, and the quickstart's data and teacher; installed as `scalekd_hf.recipes`."""
