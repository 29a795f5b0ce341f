"""From data sets to prepared images, in an order that can be found again."""
